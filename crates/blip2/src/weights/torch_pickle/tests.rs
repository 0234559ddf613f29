use super::*;

const MAGIC_PICKLE: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";
const VERSION_PICKLE: &[u8] = b"\x80\x02M\xe9\x03.";
const FACTS_PICKLE: &[u8] = b"\x80\x02}q\x00X\x0d\x00\x00\x00little_endian\x88s.";

/// A legacy checkpoint around the pickle `checkpoint`, with the storages `(key, n_elements, bytes)`.
fn legacy(checkpoint: &[u8], storages: &[(&str, u64, &[u8])]) -> Vec<u8> {
    let mut file = [MAGIC_PICKLE, VERSION_PICKLE, FACTS_PICKLE, checkpoint, b"\x80\x02]("].concat();
    for (key, ..) in storages {
        file.extend(text(key));
    }
    file.extend(b"e.");
    for (_, n_elements, bytes) in storages {
        file.extend(n_elements.to_le_bytes());
        file.extend(*bytes);
    }
    file
}

pub(super) fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

/// LONG1 of eight bytes.
pub(super) fn int(value: i64) -> Vec<u8> {
    [b"\x8a\x08", &value.to_le_bytes()[..]].concat()
}

fn ints(values: &[i64]) -> Vec<u8> {
    [b"(".to_vec(), values.iter().flat_map(|&value| int(value)).collect(), b"t".to_vec()].concat()
}

/// The instructions that leave one tensor on the stack.
pub(super) fn tensor(
    class: &str,
    key: &str,
    n_elements: i64,
    offset: i64,
    shape: &[i64],
    strides: &[i64],
) -> Vec<u8> {
    [
        &b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n"[..],
        format!("{class}\n").as_bytes(),
        &text(key),
        &text("cpu"),
        &int(n_elements),
        b"NtQ",
        &int(offset),
        &ints(shape),
        &ints(strides),
        b"\x89ccollections\nOrderedDict\n)RtR",
    ]
    .concat()
}

/// A state dict with the one tensor that `instructions` make.
pub(super) fn state_dict(name: &str, instructions: &[u8]) -> Vec<u8> {
    [&b"\x80\x02ccollections\nOrderedDict\n)R"[..], &text(name), instructions, b"s."].concat()
}

pub(super) fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub(super) fn open(bytes: &[u8]) -> Result<TorchCheckpoint> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.pth");
    std::fs::write(&path, bytes).unwrap();
    TorchCheckpoint::open(&path)
}

pub(super) fn refusal(bytes: &[u8]) -> String {
    let message = open(bytes).expect_err("this file must be refused").to_string();
    assert!(message.contains("weights.pth"), "the message names the file: {message}");
    message
}

fn small_file() -> Vec<u8> {
    let values = floats(&[0., 1., 2., 3., 4., 5.]);
    // Shape [2, 3] stored column by column: strides [1, 2].
    let pickle = state_dict("layer.weight", &tensor("FloatStorage", "7", 6, 0, &[2, 3], &[1, 2]));
    legacy(&pickle, &[("7", 6, &values)])
}

#[test]
fn permuted_strides_are_followed() {
    let file = open(&small_file()).unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["layer.weight"]);
    assert_eq!(file.shape("layer.weight").unwrap(), [2, 3]);
    assert_eq!(file.f32("layer.weight", &[2, 3]).unwrap(), [0., 2., 4., 1., 3., 5.]);
    assert!(matches!(file.f32("layer.weight", &[3, 2]), Err(Error::TensorShape { .. })));
    assert!(matches!(file.f32("layer.bias", &[3]), Err(Error::MissingTensor { .. })));
    assert!(file.i64("layer.weight", &[2, 3]).unwrap_err().to_string().contains("floating-point"));
}

#[test]
fn every_storage_class_is_decoded() {
    let cases: [(&str, Vec<u8>); 10] = [
        ("DoubleStorage", [1f64, -2.0].iter().flat_map(|value| value.to_le_bytes()).collect()),
        ("FloatStorage", floats(&[1., -2.])),
        ("HalfStorage", [1., -2.].iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect()),
        (
            "BFloat16Storage",
            [1., -2.].iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        ),
        ("LongStorage", [1i64, -2].iter().flat_map(|value| value.to_le_bytes()).collect()),
        ("IntStorage", [1i32, -2].iter().flat_map(|value| value.to_le_bytes()).collect()),
        ("ShortStorage", [1i16, -2].iter().flat_map(|value| value.to_le_bytes()).collect()),
        ("CharStorage", vec![1, 0xfe]),
        ("ByteStorage", vec![1, 0xfe]),
        ("BoolStorage", vec![1, 0]),
    ];
    for (class, bytes) in cases {
        let file =
            open(&legacy(&state_dict("x", &tensor(class, "0", 2, 0, &[2], &[1])), &[("0", 2, &bytes)]));
        let file = file.unwrap();
        match class {
            "DoubleStorage" | "FloatStorage" | "HalfStorage" | "BFloat16Storage" => {
                assert_eq!(file.f32("x", &[2]).unwrap(), [1., -2.], "{class}");
            }
            "ByteStorage" => assert_eq!(file.i64("x", &[2]).unwrap(), [1, 254]),
            "BoolStorage" => assert_eq!(file.i64("x", &[2]).unwrap(), [1, 0]),
            _ => assert_eq!(file.i64("x", &[2]).unwrap(), [1, -2], "{class}"),
        }
    }
}

#[test]
fn a_file_cut_anywhere_is_refused_without_a_panic() {
    let file = small_file();
    assert!(open(&file).is_ok());
    for length in 0..file.len() {
        let reason = index(&file[..length]).expect_err("a cut file must be refused");
        assert!(
            reason.contains("fetch it again") || reason.contains("not a PyTorch"),
            "cut at {length}: {reason}"
        );
    }
}

#[test]
fn a_file_with_any_byte_changed_never_panics_nor_reads_outside() {
    let file = small_file();
    for at in 0..file.len() {
        for change in [0x01, 0x80, 0xff] {
            let mut damaged = file.clone();
            damaged[at] ^= change;
            let Ok(tensors) = index(&damaged) else { continue };
            for tensor in tensors.values() {
                assert!(tensor.gather(&damaged, |[byte]| byte).len() <= file.len());
            }
        }
    }
}

#[test]
fn code_is_refused_by_name_and_not_run() {
    let evil = state_dict("x", b"cos\nsystem\n(X\x04\x00\x00\x00exittR");
    assert!(refusal(&legacy(&evil, &[])).contains("`os.system`"));
    let by_stack = [b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93)R.".to_vec()].concat();
    assert!(refusal(&legacy(&by_stack, &[])).contains("`builtins.eval`"));
    // Also in place of the magic number, before anything is known about the file.
    assert!(refusal(b"\x80\x02cposix\nsystem\n.").contains("`posix.system`"));
    // Calling a value that is no function, and the instructions that make objects of any class.
    assert!(refusal(&legacy(b"\x80\x02N)R.", &[])).contains("not a known function"));
    for opcode in [b'i', b'o', 0x81, 0x92, 0x82] {
        assert!(refusal(&legacy(&[0x80, 2, opcode, b'.'], &[])).contains("refused"), "{opcode:#x}");
    }
}

#[test]
fn views_that_leave_their_storage_are_refused() {
    let values = floats(&[0.; 6]);
    let cases: [(i64, i64, &[i64], &[i64]); 9] = [
        (6, 1, &[2, 3], &[3, 1]),               // one past the end
        (6, 0, &[2, 3], &[4, 1]),               // a stride too long
        (6, -1, &[2, 3], &[3, 1]),              // before the start
        (6, 0, &[-2, -3], &[3, 1]),             // negative sizes whose product is right
        (6, 0, &[1 << 40, 1 << 40], &[0, 0]),   // the number of elements overflows
        (6, 0, &[1 << 40], &[0]),               // one element repeated for ever
        (6, 0, &[2, 3], &[i64::MAX, i64::MAX]), // the last index overflows
        (6, i64::MAX, &[2], &[i64::MAX]),       // the same from the offset
        (6, 0, &[2, 3], &[1]),                  // fewer strides than dimensions
    ];
    for (n, offset, shape, strides) in cases {
        let pickle = state_dict("x", &tensor("FloatStorage", "0", n, offset, shape, strides));
        refusal(&legacy(&pickle, &[("0", 6, &values)]));
    }
    let deep = state_dict("x", &tensor("FloatStorage", "0", 6, 0, &[1; 9], &[1; 9]));
    assert!(refusal(&legacy(&deep, &[("0", 6, &values)])).contains("dimensions"));
}

#[test]
fn an_axis_of_one_may_have_any_stride() {
    let pickle = state_dict("x", &tensor("FloatStorage", "0", 2, 0, &[1, 2], &[i64::MAX, 1]));
    let file = open(&legacy(&pickle, &[("0", 2, &floats(&[4., 5.]))])).unwrap();
    assert_eq!(file.f32("x", &[1, 2]).unwrap(), [4., 5.]);
}

#[test]
fn sizes_that_promise_more_than_the_file_holds_are_refused() {
    let values = floats(&[0.; 6]);
    for n_elements in [7, 1 << 62, i64::MAX] {
        let pickle = state_dict("x", &tensor("DoubleStorage", "0", n_elements, 0, &[6], &[1]));
        refusal(&legacy(&pickle, &[("0", n_elements as u64, &values)]));
        refusal(&legacy(&pickle, &[("0", 6, &values)]));
    }
    // A text of four gigabytes, an integer of 255 bytes, a memo place that does not exist.
    refusal(&legacy(b"\x80\x02X\xff\xff\xff\xff.", &[]));
    refusal(&legacy(&[&b"\x80\x02\x8a\xff"[..], &[1; 255], b"."].concat(), &[]));
    refusal(&legacy(b"\x80\x02j\xff\xff\xff\xff.", &[]));
    // Storages missing, unused, described twice in different ways.
    let pickle = state_dict("x", &tensor("FloatStorage", "0", 6, 0, &[6], &[1]));
    refusal(&legacy(&pickle, &[]));
    refusal(&legacy(&pickle, &[("0", 6, &values), ("1", 6, &values)]));
    refusal(&legacy(&pickle, &[("0", 6, &values), ("0", 6, &values)]));
}

#[test]
fn runaway_programs_end() {
    let many = [&b"\x80\x02"[..], &vec![b'N'; 3_000_000], b"."].concat();
    assert!(refusal(&legacy(&many, &[])).contains("more than"));
    let marks = [&b"\x80\x02"[..], &vec![b'('; 3_000_000], b"."].concat();
    assert!(refusal(&legacy(&marks, &[])).contains("more than"));
    // A dictionary that holds itself, and one that doubles with every level.
    let endless = [&b"\x80\x02}q\x00"[..], &text("a"), b"h\x00s."].concat();
    assert!(refusal(&legacy(&endless, &[])).contains("nested"));
    let mut doubling = b"\x80\x02}q\x00".to_vec();
    for level in 0..40 {
        let (a, b) = (text("a"), text("b"));
        doubling.extend([&b"}("[..], &a, &[b'h', level], &b, &[b'h', level], b"uq", &[level + 1]].concat());
    }
    doubling.push(b'.');
    assert!(refusal(&legacy(&doubling, &[])).contains("nested"));
    // An empty stack, popped.
    for program in [&b"0."[..], b".", b"t.", b"s.", b"(0.", b"R.", b"Q.", b"b.", b"a.", b"q\x00."] {
        refusal(&legacy(&[b"\x80\x02", program].concat(), &[]));
    }
}

#[test]
fn tensors_in_nested_dictionaries_have_dotted_names() {
    let inner = tensor("FloatStorage", "0", 1, 0, &[], &[]);
    let pickle =
        [&b"\x80\x02}("[..], &text("epoch"), b"K\x05", &text("model"), b"}", &text("scale"), &inner, b"su."]
            .concat();
    let file = open(&legacy(&pickle, &[("0", 1, &floats(&[3.]))])).unwrap();
    assert_eq!(file.f32("model.scale", &[]).unwrap(), [3.]);
}

#[test]
fn other_files_are_refused() {
    assert!(refusal(b"").contains("empty"));
    assert!(refusal(b"\x89PNG\r\n").contains("not a PyTorch checkpoint"));
    assert!(refusal(b"\x80\x02K\x01.").contains("not a PyTorch checkpoint"));
    assert!(refusal(&legacy(b"\x80\x02}.", &[])).contains("no tensor"));
}
