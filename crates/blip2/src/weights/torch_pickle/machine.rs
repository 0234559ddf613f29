//! The pickle machine, reduced to what a file of tensors needs.
//!
//! A pickle is a program for a small stack machine whose `GLOBAL` and `REDUCE` instructions import and call any Python
//! function. Here nothing is imported and nothing is called: four kinds of callable are known by name and describe
//! data, any other name ends the reading. Texts stay slices of the file; what values may add up to is bounded.

use std::collections::HashMap;

/// Stack entries, memo entries and container items that one pickle may make; a checkpoint of 2,000 tensors needs about
/// 100,000. Bounds what a hostile file can claim to about 100 MB.
const MAX_ITEMS: usize = 2_000_000;
/// More dimensions than any tensor of a neural network has.
const MAX_RANK: usize = 8;

/// What a storage holds, from the name of its Python class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StorageKind {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

impl StorageKind {
    fn from_class(name: &str) -> Option<Self> {
        Some(match name {
            "DoubleStorage" => Self::F64,
            "FloatStorage" => Self::F32,
            "HalfStorage" => Self::F16,
            "BFloat16Storage" => Self::Bf16,
            "LongStorage" => Self::I64,
            "IntStorage" => Self::I32,
            "ShortStorage" => Self::I16,
            "CharStorage" => Self::I8,
            "ByteStorage" => Self::U8,
            "BoolStorage" => Self::Bool,
            _ => return None,
        })
    }

    /// Bytes of one element.
    pub(super) fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }
}

/// The only callables that a pickle may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(StorageKind),
}

impl Global {
    fn find(module: &str, name: &str) -> Result<Self, String> {
        let known = match (module, name) {
            ("collections", "OrderedDict") => Some(Self::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Some(Self::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Some(Self::RebuildParameter),
            ("torch", class) => StorageKind::from_class(class).map(Self::Storage),
            _ => None,
        };
        known.ok_or_else(|| {
            format!(
                "it asks to run `{}.{}`, which tensors do not need: refused, nothing was run; \
                 take the weights from a source that you trust, best as safetensors",
                printable(module),
                printable(name)
            )
        })
    }
}

/// A value on the stack. Containers live in [`Pickle::objects`] and are referred to by index, so a pickle that puts a
/// container into itself makes neither a leak nor an endless walk here.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Int(i128),
    Float,
    Text(&'a str),
    Global(Global),
    Object(usize),
}

/// A storage by name: which bytes it stands for is the container's matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StorageRef<'a> {
    pub(super) key: &'a str,
    pub(super) kind: StorageKind,
    pub(super) n_elements: usize,
}

impl StorageRef<'_> {
    pub(super) fn n_bytes(&self) -> Result<usize, String> {
        self.n_elements
            .checked_mul(self.kind.size())
            .ok_or_else(|| "a storage is larger than memory: the file is damaged".into())
    }
}

/// A strided view of a storage; every index it can reach was checked to be inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TensorView<'a> {
    pub(super) storage: StorageRef<'a>,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

#[derive(Debug)]
pub(super) enum Object<'a> {
    Tuple(Vec<Value<'a>>),
    List(Vec<Value<'a>>),
    Dict(Vec<(Value<'a>, Value<'a>)>),
    Storage(StorageRef<'a>),
    Tensor(TensorView<'a>),
}

/// What one pickle describes.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    pub(super) root: Value<'a>,
    pub(super) objects: Vec<Object<'a>>,
    /// Where in the file the pickle ends.
    pub(super) end: usize,
}

/// Reads the pickle that starts at byte `start` of `bytes`.
///
/// # Errors
/// A sentence for an error message that names the file.
pub(super) fn read(bytes: &[u8], start: usize) -> Result<Pickle<'_>, String> {
    let mut machine = Machine {
        input: Cursor { bytes, at: start },
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        objects: Vec::new(),
        n_items: 0,
    };
    let root = machine.run()?;
    Ok(Pickle { root, objects: machine.objects, end: machine.input.at })
}

/// Bounds-checked reading of the file's bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(n).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or("the file is cut short: fetch it again")?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// A little-endian unsigned number of `n` ≤ 8 bytes.
    pub(super) fn number(&mut self, n: usize) -> Result<u64, String> {
        Ok(self.take(n)?.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    }

    /// The same, as a count of bytes to come.
    fn length(&mut self, n: usize) -> Result<usize, String> {
        usize::try_from(self.number(n)?).map_err(|_| "a length does not fit this machine's memory".into())
    }

    fn text(&mut self, n: usize) -> Result<&'a str, String> {
        std::str::from_utf8(self.take(n)?)
            .map_err(|_| "a text in it is not UTF-8: the file is damaged".into())
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.bytes[self.at.min(self.bytes.len())..];
        let n = rest.iter().position(|&byte| byte == b'\n').ok_or("the file is cut short: fetch it again")?;
        let line = self.text(n)?;
        self.at += 1;
        Ok(line)
    }
}

struct Machine<'a> {
    input: Cursor<'a>,
    stack: Vec<Value<'a>>,
    /// Heights of the stack at which `MARK` was said.
    marks: Vec<usize>,
    memo: HashMap<u64, Value<'a>>,
    objects: Vec<Object<'a>>,
    n_items: usize,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Value<'a>, String> {
        loop {
            let opcode = self.input.take(1)?[0];
            match opcode {
                b'.' => return self.pop(),                           // STOP
                0x80 => drop(self.input.take(1)?), // PROTO: the version changes nothing here
                0x95 => drop(self.input.take(8)?), // FRAME: a reading hint
                b'(' => self.mark()?,              // MARK
                b'0' => drop(self.pop()?),         // POP
                b'1' => drop(self.pop_to_mark()?), // POP_MARK
                b'c' => self.global()?,            // GLOBAL
                0x93 => self.stack_global()?,      // STACK_GLOBAL
                b'R' => self.reduce()?,            // REDUCE
                b'b' => self.build()?,             // BUILD
                b'Q' => self.persistent_load()?,   // BINPERSID
                b'q' | b'r' | 0x94 => self.remember(opcode)?, // BINPUT, LONG_BINPUT, MEMOIZE
                b'h' | b'j' => self.recall(opcode)?, // BINGET, LONG_BINGET
                b'a' | b'e' => self.append(opcode == b'e')?, // APPEND, APPENDS
                b's' | b'u' => self.set_items(opcode == b'u')?, // SETITEM, SETITEMS
                b')' | b't' | 0x85..=0x87 => self.tuple(opcode)?, // EMPTY_TUPLE, TUPLE, TUPLE1, 2, 3
                b']' => self.push_object(Object::List(Vec::new()))?, // EMPTY_LIST
                b'}' => self.push_object(Object::Dict(Vec::new()))?, // EMPTY_DICT
                _ => {
                    let value = self.literal(opcode)?;
                    self.push(value)?;
                }
            }
        }
    }

    /// The values that stand in the program itself.
    fn literal(&mut self, opcode: u8) -> Result<Value<'a>, String> {
        let input = &mut self.input;
        Ok(match opcode {
            b'N' => Value::None,
            0x88 => Value::Bool(true),
            0x89 => Value::Bool(false),
            b'K' => Value::Int(input.number(1)?.into()),
            b'M' => Value::Int(input.number(2)?.into()),
            b'J' => Value::Int((input.number(4)? as u32 as i32).into()), // BININT: 32 bits, signed
            0x8a => {
                // LONG1: little-endian two's complement of any length; 16 bytes hold all that torch writes.
                let n = input.length(1)?;
                let bytes = input.take(n)?;
                if n > 16 {
                    return Err(format!("it holds an integer of {n} bytes: this is not a file of tensors"));
                }
                let fill = if bytes.last().is_some_and(|&byte| byte >= 0x80) { 0xff } else { 0 };
                let mut wide = [fill; 16];
                wide[..n].copy_from_slice(bytes);
                Value::Int(i128::from_le_bytes(wide))
            }
            b'G' => {
                input.take(8)?;
                Value::Float
            }
            b'X' => {
                let n = input.length(4)?;
                Value::Text(input.text(n)?)
            }
            0x8c => {
                let n = input.length(1)?;
                Value::Text(input.text(n)?)
            }
            other => {
                return Err(format!(
                    "byte {} is the pickle instruction {other:#04x}, which files of tensors do not use: refused",
                    input.at - 1
                ));
            }
        })
    }

    fn charge(&mut self, n: usize) -> Result<(), String> {
        self.n_items += n;
        if self.n_items > MAX_ITEMS {
            return Err(format!("it describes more than {MAX_ITEMS} values: this is not a file of tensors"));
        }
        Ok(())
    }

    fn push(&mut self, value: Value<'a>) -> Result<(), String> {
        self.charge(1)?;
        self.stack.push(value);
        Ok(())
    }

    fn push_object(&mut self, object: Object<'a>) -> Result<(), String> {
        self.objects.push(object);
        self.push(Value::Object(self.objects.len() - 1))
    }

    /// The topmost value, never past a mark.
    fn pop(&mut self) -> Result<Value<'a>, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(DAMAGED.into());
        }
        self.stack.pop().ok_or_else(|| DAMAGED.into())
    }

    fn mark(&mut self) -> Result<(), String> {
        self.charge(1)?;
        self.marks.push(self.stack.len());
        Ok(())
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value<'a>>, String> {
        let mark = self.marks.pop().ok_or(DAMAGED)?;
        Ok(self.stack.split_off(mark))
    }

    fn remember(&mut self, opcode: u8) -> Result<(), String> {
        let place = match opcode {
            b'q' => self.input.number(1)?,
            b'r' => self.input.number(4)?,
            _ => self.memo.len() as u64,
        };
        self.charge(1)?;
        let value = *self.stack.last().ok_or(DAMAGED)?;
        self.memo.insert(place, value);
        Ok(())
    }

    fn recall(&mut self, opcode: u8) -> Result<(), String> {
        let place = self.input.number(if opcode == b'h' { 1 } else { 4 })?;
        let value = *self.memo.get(&place).ok_or(DAMAGED)?;
        self.push(value)
    }

    fn tuple(&mut self, opcode: u8) -> Result<(), String> {
        let items = match opcode {
            b')' => Vec::new(),
            b't' => self.pop_to_mark()?,
            _ => {
                let mut items = (0x85..=opcode).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
                items.reverse();
                items
            }
        };
        self.push_object(Object::Tuple(items))
    }

    fn append(&mut self, many: bool) -> Result<(), String> {
        let items = if many { self.pop_to_mark()? } else { vec![self.pop()?] };
        let Value::Object(list) = *self.stack.last().ok_or(DAMAGED)? else { return Err(DAMAGED.into()) };
        let Object::List(list) = &mut self.objects[list] else { return Err(DAMAGED.into()) };
        list.extend(items);
        Ok(())
    }

    fn set_items(&mut self, many: bool) -> Result<(), String> {
        let items = if many {
            self.pop_to_mark()?
        } else {
            let value = self.pop()?;
            vec![self.pop()?, value]
        };
        let Value::Object(dict) = *self.stack.last().ok_or(DAMAGED)? else { return Err(DAMAGED.into()) };
        let Object::Dict(dict) = &mut self.objects[dict] else { return Err(DAMAGED.into()) };
        let pairs = items.chunks_exact(2);
        if !pairs.remainder().is_empty() {
            return Err(DAMAGED.into());
        }
        dict.extend(pairs.map(|pair| (pair[0], pair[1])));
        Ok(())
    }

    fn global(&mut self) -> Result<(), String> {
        let module = self.input.line()?;
        let name = self.input.line()?;
        self.push(Value::Global(Global::find(module, name)?))
    }

    fn stack_global(&mut self) -> Result<(), String> {
        let (Value::Text(name), Value::Text(module)) = (self.pop()?, self.pop()?) else {
            return Err(DAMAGED.into());
        };
        self.push(Value::Global(Global::find(module, name)?))
    }

    /// Python would set attributes here. The only ones torch writes are a state dict's version notes: dropped.
    fn build(&mut self) -> Result<(), String> {
        self.pop()?;
        match *self.stack.last().ok_or(DAMAGED)? {
            Value::Object(object) if matches!(self.objects[object], Object::Dict(_)) => Ok(()),
            _ => Err("it sets attributes of something that is not a state dict: refused".into()),
        }
    }

    /// Python would call a function here; the known ones are carried out as descriptions.
    fn reduce(&mut self) -> Result<(), String> {
        let arguments = self.pop()?;
        let Value::Global(callable) = self.pop()? else {
            return Err("it calls something that is not a known function: refused, nothing was run".into());
        };
        let arguments = self.tuple_items(arguments)?;
        match (callable, arguments) {
            (Global::OrderedDict, []) => self.push_object(Object::Dict(Vec::new())),
            (Global::RebuildTensor, [storage, offset, shape, strides, ..]) => {
                let view = self.tensor_view(*storage, *offset, *shape, *strides)?;
                self.push_object(Object::Tensor(view))
            }
            (Global::RebuildParameter, [tensor, ..]) => match *tensor {
                Value::Object(object) if matches!(self.objects[object], Object::Tensor(_)) => {
                    self.push(*tensor)
                }
                _ => Err(DAMAGED.into()),
            },
            _ => Err(format!("it calls {callable:?} in a way that torch does not: refused")),
        }
    }

    fn tuple_items(&self, value: Value<'a>) -> Result<&[Value<'a>], String> {
        match value {
            Value::Object(object) => match &self.objects[object] {
                Object::Tuple(items) => Ok(items),
                _ => Err(DAMAGED.into()),
            },
            _ => Err(DAMAGED.into()),
        }
    }

    /// `("storage", FloatStorage, "key", "cpu", n_elements[, None])`: a storage that the container holds elsewhere.
    fn persistent_load(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let storage = match self.tuple_items(id)? {
            [
                Value::Text("storage"),
                Value::Global(Global::Storage(kind)),
                Value::Text(key),
                Value::Text(_),
                Value::Int(n_elements),
                rest @ ..,
            ] if rest.iter().all(|value| *value == Value::None) => {
                StorageRef { key, kind: *kind, n_elements: size(*n_elements)? }
            }
            _ => return Err("it refers to something that is not a plain tensor storage: refused".into()),
        };
        self.push_object(Object::Storage(storage))
    }

    fn sizes(&self, tuple: Value<'a>) -> Result<Vec<usize>, String> {
        let items = self.tuple_items(tuple)?;
        if items.len() > MAX_RANK {
            return Err(format!("a tensor with {} dimensions: at most {MAX_RANK} are read", items.len()));
        }
        let sizes = items.iter().map(|item| match *item {
            Value::Int(value) => size(value),
            _ => Err(DAMAGED.into()),
        });
        sizes.collect()
    }

    fn tensor_view(
        &self,
        storage: Value<'a>,
        offset: Value<'a>,
        shape: Value<'a>,
        strides: Value<'a>,
    ) -> Result<TensorView<'a>, String> {
        let (Value::Object(storage), Value::Int(offset)) = (storage, offset) else {
            return Err(DAMAGED.into());
        };
        let Object::Storage(storage) = self.objects[storage] else { return Err(DAMAGED.into()) };
        let (offset, shape, strides) = (size(offset)?, self.sizes(shape)?, self.sizes(strides)?);
        if shape.len() != strides.len() {
            return Err(DAMAGED.into());
        }
        let view = TensorView { storage, offset, shape, strides };
        if !view.is_inside() {
            return Err(format!(
                "a tensor of shape {:?} with strides {:?} from element {} reaches outside of its storage of {} elements: \
                 the file is damaged",
                view.shape, view.strides, view.offset, storage.n_elements
            ));
        }
        Ok(view)
    }
}

impl TensorView<'_> {
    /// Whether all elements lie in the storage, and there are no more of them than the storage has (views that repeat
    /// elements could claim any amount of memory; checkpoints have none).
    fn is_inside(&self) -> bool {
        let Some(n_elements) = self.shape.iter().try_fold(1_usize, |n, &extent| n.checked_mul(extent)) else {
            return false;
        };
        if n_elements == 0 {
            return self.offset <= self.storage.n_elements;
        }
        let extents = self.shape.iter().zip(&self.strides);
        let last = extents
            .map(|(&extent, &stride)| (extent - 1).checked_mul(stride))
            .try_fold(self.offset, |last, reach| last.checked_add(reach?));
        n_elements <= self.storage.n_elements && last.is_some_and(|last| last < self.storage.n_elements)
    }
}

/// A count or size: not negative, and of this machine's range.
fn size(value: i128) -> Result<usize, String> {
    usize::try_from(value).map_err(|_| format!("{value} cannot be a size: the file is damaged"))
}

/// A name from the file, safe to show: short, without control characters.
pub(super) fn printable(name: &str) -> String {
    name.chars().take(60).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

const DAMAGED: &str = "its pickle does not fit together: the file is damaged";
