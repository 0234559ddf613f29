use super::*;
use crate::weights::safetensors::Safetensors;

fn golden(name: &str) -> String {
    format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn every_type_decodes_to_the_bits_of_the_gguf_package() {
    let file = Gguf::open(golden("gguf_types.gguf")).unwrap();
    let expected = Safetensors::open(golden("gguf_types.safetensors")).unwrap();
    assert_eq!(file.names().count(), 14);
    for name in file.names() {
        let expected_values = expected.read_f32(name).unwrap();
        assert_eq!(file.shape(name).unwrap(), expected.shape(name).unwrap(), "{name}");
        assert_eq!(file.read_f32(name).unwrap(), expected_values, "{name}");
        let rows = file.tensor(name).unwrap();
        let mut row = vec![f32::NAN; rows.row_len()];
        for (i, expected) in expected_values.chunks(rows.row_len()).enumerate() {
            rows.read_row(i, &mut row);
            assert_eq!(row, expected, "{name} row {i}");
        }
    }
    file.finish().unwrap();
    expected.finish().unwrap();
}

#[test]
fn metadata_of_every_type_is_read() {
    let file = Gguf::open(golden("gguf_types.gguf")).unwrap();
    let expected = [
        ("uint8", Value::Unsigned(200)),
        ("int8", Value::Signed(-100)),
        ("uint16", Value::Unsigned(60000)),
        ("int16", Value::Signed(-30000)),
        ("uint32", Value::Unsigned(4_000_000_000)),
        ("int32", Value::Signed(-2_000_000_000)),
        ("uint64", Value::Unsigned((1 << 63) + 1)),
        ("int64", Value::Signed(-(1 << 62))),
        ("float32", Value::Float(1.5)),
        ("float64", Value::Float(0.1)),
        ("bool", Value::Bool(true)),
        ("string", Value::String("größer".into())),
        ("array.13", Value::Array(Array::String(vec!["a".into(), "".into(), "日本".into()]))),
        ("array.14", Value::Array(Array::Signed(vec![1, -2, 3]))),
        ("array.15", Value::Array(Array::Float(vec![0.5, 0.25]))),
        ("array.16", Value::Array(Array::Array(vec![Array::Signed(vec![1]), Array::Signed(vec![2, 3])]))),
    ];
    assert_eq!(file.metadata().len(), expected.len() + 1);
    for (key, value) in expected {
        assert_eq!(file.get(&format!("value.{key}")), Some(&value), "{key}");
    }
    assert_eq!(file.string("general.architecture").unwrap(), "golden");
    assert_eq!(file.u32("value.uint8").unwrap(), 200);
    assert_eq!(file.f32("value.uint8").unwrap(), 200.0);
    assert_eq!(file.strings("value.array.13").unwrap(), ["a", "", "日本"]);
    assert_eq!(file.integers("value.array.14").unwrap(), [1, -2, 3]);
    for (key, reason) in [("value.int8", "is not a whole number"), ("value.none", "has no metadata")] {
        let error = file.u32(key).unwrap_err().to_string();
        assert!(error.contains(reason) && error.contains("gguf_types.gguf"), "{error}");
    }
}

#[test]
fn tensors_that_nobody_read_are_told() {
    let file = Gguf::open(golden("gguf_types.gguf")).unwrap();
    file.read_f32("Q4_1").unwrap();
    file.ignore(|name| name.starts_with('F') || name.ends_with('K'));
    let Err(Error::UnusedTensors { names }) = file.finish() else { panic!("nothing was missed") };
    assert_eq!(names, ["BF16", "Q4_0", "Q5_0", "Q5_1", "Q8_0", "cube"]);
    assert!(matches!(file.tensor("absent"), Err(Error::MissingTensor { name }) if name == "absent"));
}

/// A file made field by field, so that a test can get one of them wrong.
struct Forged(Vec<u8>);

impl Forged {
    fn new(version: u32, n_tensors: u64, n_metadata: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(version).u64(n_tensors).u64(n_metadata)
    }
    fn u32(mut self, n: u32) -> Self {
        self.0.extend(n.to_le_bytes());
        self
    }
    fn u64(mut self, n: u64) -> Self {
        self.0.extend(n.to_le_bytes());
        self
    }
    fn text(self, text: &str) -> Self {
        let mut longer = self.u64(text.len() as u64);
        longer.0.extend(text.as_bytes());
        longer
    }
    fn tensor(self, name: &str, shape: &[u64], ggml_type: u32, offset: u64) -> Self {
        let named = self.text(name).u32(shape.len() as u32);
        shape.iter().fold(named, |file, &n| file.u64(n)).u32(ggml_type).u64(offset)
    }
    fn data(mut self, n_bytes: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32) + n_bytes, 0);
        self
    }
}

fn reason(file: Forged) -> String {
    match read_header(&file.0) {
        Ok(_) => panic!("the file was accepted"),
        Err(reason) => reason,
    }
}

#[test]
fn a_sound_forgery_is_accepted() {
    let two = Forged::new(3, 2, 0).tensor("a", &[8], 0, 0).tensor("b", &[2, 3], 0, 32).data(32 + 24);
    let header = read_header(&two.0).unwrap();
    assert_eq!(header.tensors["b"].shape, [3, 2]);
    assert!(read_header(&Forged::new(2, 0, 0).data(0).0).is_ok());
}

#[test]
fn each_lie_in_a_header_is_refused_for_what_it_is() {
    let huge = u64::MAX;
    let one = || Forged::new(3, 1, 0);
    let entry = |key: &str| Forged::new(3, 0, 1).text(key);
    let twice = Forged::new(3, 0, 2).text("k").u32(4).u32(1).text("k").u32(4).u32(2);
    for (file, expected) in [
        (Forged(b"PK\x03\x04 and so on".to_vec()), "zip archive"),
        (Forged(b"<!DOCTYPE html><html>".to_vec()), "web page"),
        (Forged(b"version https://git-lfs.github.com/spec/v1".to_vec()), "git lfs pull"),
        (Forged(b"abcdefgh".to_vec()), "not a GGUF file"),
        (Forged(b"GGUF\x03".to_vec()), "cut short"),
        (Forged::new(1, 0, 0), "version 1"),
        (Forged::new(4, 0, 0), "version 4"),
        (Forged::new(3u32.swap_bytes(), 0, 0), "big-endian"),
        (Forged::new(3, huge, 0), "more than the"),
        (Forged::new(3, 0, huge), "more than the"),
        (Forged::new(3, 1000, 0), "than it has bytes for"),
        (entry("k").u32(13).u64(0), "unknown type 13"),
        (entry("k").u32(7).u32(2), "true or false"),
        (entry("k").u32(8).u64(huge), "a text of"),
        (entry("k").u32(8).u64(100), "cut short"),
        (entry("k").u32(8).u64(1).u32(0xff), "not UTF-8"),
        (entry("k").u32(9).u32(4).u64(huge), "more than the"),
        (entry("k").u32(9).u32(4).u64(1 << 20), "than it has bytes for"),
        (entry("k").u32(9).u32(77).u64(1), "unknown type 77"),
        ((0..5).fold(entry("k").u32(9), |f, _| f.u32(9).u64(1)).u32(4).u64(0), "nests arrays"),
        (entry("general.alignment").u32(4).u32(24).data(0), "power of two"),
        (entry("general.alignment").u32(4).u32(0).data(0), "power of two"),
        (twice.data(0), "`k` twice"),
        (one().tensor("t", &[], 0, 0).data(64), "0 dimensions"),
        (one().tensor("t", &[1; 5], 0, 0).data(64), "5 dimensions"),
        (one().tensor("t", &[4, 0], 0, 0).data(64), "impossible dimension"),
        (one().tensor("t", &[1 << 40, 1 << 40], 0, 0).data(64), "impossible shape"),
        (one().tensor("t", &[1 << 62], 24, 0).data(64), "impossible shape"),
        (one().tensor("t", &[33], 2, 0).data(64), "blocks of 32"),
        (one().tensor("t", &[32], 19, 0).data(64), "IQ1_S"),
        (one().tensor("t", &[32], 99, 0).data(64), "unknown type"),
        (one().tensor("t", &[17], 0, 0).data(64), "beyond the end"),
        (one().tensor("t", &[4], 0, huge - 31).data(64), "beyond the end"),
        (one().tensor("t", &[4], 0, 64).data(64), "beyond the end"),
        (one().tensor("t", &[4], 0, 4).data(64), "multiple of 32"),
        (one().tensor("t\u{1b}[2J", &[4], 0, 4).data(64), "t\\u{1b}[2J"),
        (Forged::new(3, 2, 0).tensor("t", &[4], 0, 0).tensor("t", &[4], 0, 32).data(64), "`t` twice"),
        (Forged::new(3, 2, 0).tensor("t", &[16], 0, 0).tensor("u", &[4], 0, 32).data(64), "overlap"),
    ] {
        let reason = reason(file);
        assert!(reason.contains(expected), "expected {expected:?}, got {reason:?}");
    }
}

#[test]
fn a_cut_file_is_refused_and_a_flipped_bit_never_panics() {
    let bytes = std::fs::read(golden("gguf_types.gguf")).unwrap();
    let header_len = bytes.len() - 20_000; // all of the header and some data
    for len in (0..header_len).chain((header_len..bytes.len()).step_by(997)) {
        assert!(read_header(&bytes[..len]).is_err(), "accepted {len} of {} bytes", bytes.len());
    }
    let mut out = vec![0.0; 2048];
    for bit in 0..header_len * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        // Whatever is still accepted must be readable within the file.
        for entry in read_header(&damaged).into_iter().flat_map(|header| header.tensors.into_values()) {
            let n_values: usize = entry.shape.iter().product();
            out.resize(n_values, 0.0);
            entry.encoding.decode(&damaged[entry.range], &mut out);
        }
    }
}

#[test]
fn the_default_language_model_has_the_tensors_it_should() {
    let Some(frozen) = std::env::var_os("BLIP2_FROZEN") else {
        return eprintln_skipped();
    };
    let file = Gguf::open(Path::new(&frozen).join("SmolLM2-135M-Instruct.Q4_1.gguf")).unwrap();
    assert_eq!(file.string("general.architecture").unwrap(), "llama");
    assert_eq!(file.u32("llama.block_count").unwrap(), 30);
    assert_eq!(file.strings("tokenizer.ggml.merges").unwrap().len(), 48_900);
    let n_parameters: usize =
        file.names().map(|name| file.shape(name).unwrap().iter().product::<usize>()).sum();
    assert_eq!(n_parameters, 134_515_008);
    let mut row = [0.0; 576];
    file.read_row_f32("token_embd.weight", 49_151, &mut row).unwrap();
    let deviation = (row.iter().map(|x| x * x).sum::<f32>() / 576.0).sqrt();
    assert!((0.05..0.3).contains(&deviation), "{deviation}");
}

#[allow(clippy::print_stderr)] // the one way a test can say that it did not run
fn eprintln_skipped() {
    eprintln!("SKIPPED: BLIP2_FROZEN does not name the folder of the frozen models");
}
