use std::borrow::Cow;
use std::io::{Cursor, Write};

use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use super::super::tests::{floats, open, refusal, state_dict, tensor};
use super::super::{StoredTensor, TorchCheckpoint};
use super::*;
use crate::weights::Encoding;

fn stored() -> SimpleFileOptions {
    SimpleFileOptions::default().compression_method(CompressionMethod::Stored)
}

fn archive(entries: &[(&str, &[u8])], options: SimpleFileOptions) -> Vec<u8> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        writer.start_file(*name, options).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

/// Shape [2, 3] stored column by column.
fn pickle() -> Vec<u8> {
    state_dict("layer.weight", &tensor("FloatStorage", "7", 6, 0, &[2, 3], &[1, 2]))
}

fn values() -> Vec<u8> {
    floats(&[0., 1., 2., 3., 4., 5.])
}

fn small_file() -> Vec<u8> {
    let entries: [(&str, &[u8]); 4] = [
        ("a/data.pkl", &pickle()),
        ("a/byteorder", b"little"),
        ("a/data/7", &values()),
        ("a/version", b"3\n"),
    ];
    archive(&entries, stored())
}

fn golden(name: &str) -> String {
    format!("{}/tests/golden/{name}.pth", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn both_containers_of_torch_save_are_read() {
    for name in ["torch_zip", "torch_legacy"] {
        let file = TorchCheckpoint::open(golden(name)).unwrap();
        let names: Vec<_> = file.names().collect();
        // The optimiser's tensors are under numbers, not names.
        let expected = [
            "also_tied",
            "brain",
            "by_column",
            "bytes",
            "double",
            "flags",
            "half",
            "ids",
            "nothing",
            "part",
            "temp",
            "tied",
        ];
        assert_eq!(names, expected.map(|name| format!("model.{name}")), "{name}");
        let f32 = |name: &str, shape: &[usize]| file.f32(&format!("model.{name}"), shape).unwrap();
        assert_eq!(f32("by_column", &[3, 2]), [0., 3., 1., 4., 2., 5.]);
        assert_eq!(f32("part", &[3]), [2., 3., 4.]);
        assert_eq!(f32("tied", &[1, 2]), [1.5, -2.5]);
        assert_eq!(f32("also_tied", &[1, 2]), [1.5, -2.5]);
        assert_eq!(f32("half", &[2]), [0.5, -1.25]);
        assert_eq!(f32("brain", &[2]), [0.5, -1.25]);
        assert_eq!(f32("double", &[1]), [0.1]);
        assert_eq!(f32("temp", &[]), [0.07]);
        assert_eq!(f32("nothing", &[0, 3]), [0.; 0]);
        let i64 = |name: &str, shape: &[usize]| file.i64(&format!("model.{name}"), shape).unwrap();
        assert_eq!(i64("ids", &[1, 4]), [0, 1, 2, 3]);
        assert_eq!(i64("bytes", &[2]), [0, 255]);
        assert_eq!(i64("flags", &[2]), [1, 0]);
    }
}

#[test]
fn tensors_are_handed_out_as_they_are_stored() {
    for name in ["torch_zip", "torch_legacy"] {
        let file = TorchCheckpoint::open(golden(name)).unwrap();
        let StoredTensor { shape, encoding, bytes } = file.stored("model.by_column").unwrap();
        assert_eq!((shape.as_slice(), encoding), (&[3, 2][..], Encoding::F32));
        assert!(matches!(bytes, Cow::Owned(_)) && bytes == floats(&[0., 3., 1., 4., 2., 5.]), "{name}");
        let part = file.stored("model.part").unwrap();
        assert!(matches!(part.bytes, Cow::Borrowed(_)) && part.bytes == floats(&[2., 3., 4.]), "{name}");
        let brain = file.stored("model.brain").unwrap();
        assert_eq!((brain.encoding, &*brain.bytes), (Encoding::Bf16, &[0, 0x3f, 0xa0, 0xbf][..]));
        assert!(file.stored("model.nothing").unwrap().bytes.is_empty());
    }
}

#[test]
fn a_payload_is_refused_and_not_run() {
    let message = TorchCheckpoint::open(golden("torch_payload")).unwrap_err().to_string();
    assert!(message.contains("torch_payload.pth") && message.contains("`posix.system`"), "{message}");
    assert!(message.contains("nothing was run"), "{message}");
}

#[test]
fn an_archive_cut_anywhere_is_refused_without_a_panic() {
    let file = small_file();
    assert_eq!(open(&file).unwrap().f32("layer.weight", &[2, 3]).unwrap(), [0., 2., 4., 1., 3., 5.]);
    for length in 0..file.len() {
        let reason = super::super::index(&file[..length]).expect_err("a cut archive must be refused");
        assert!(
            reason.contains("fetch it again") || reason.contains("not a PyTorch"),
            "cut at {length}: {reason}"
        );
    }
}

#[test]
fn an_archive_with_any_byte_changed_never_panics_nor_reads_outside() {
    let file = small_file();
    for at in 0..file.len() {
        for change in [0x01, 0x08, 0x80, 0xff] {
            let mut damaged = file.clone();
            damaged[at] ^= change;
            let Ok(tensors) = super::super::index(&damaged) else { continue };
            for view in tensors.values() {
                assert!(view.gather_bytes(&damaged).len() <= file.len());
            }
        }
    }
}

#[test]
fn compressed_and_missing_entries_are_named() {
    let packed = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    writer.start_file("a/data.pkl", packed).unwrap();
    writer.write_all(&pickle()).unwrap();
    writer.start_file("a/data/7", packed).unwrap();
    writer.write_all(&values()).unwrap();
    let mut file = writer.finish().unwrap().into_inner();
    // The method is told twice: before the entry, and in the directory at the end, which counts.
    let signature = b"PK\x01\x02";
    let directory: Vec<_> = (0..file.len()).filter(|&at| file[at..].starts_with(signature)).collect();
    assert_eq!(directory.len(), 2);
    let intact = file.clone();
    file[directory[1] + 10] = 8;
    assert!(refusal(&file).contains("`data/7` is compressed"));
    file.clone_from(&intact);
    file[directory[1] + 8] |= 1;
    assert!(refusal(&file).contains("`data/7` is compressed or encrypted"));
    file = intact;
    file[directory[0] + 10] = 8;
    assert!(refusal(&file).contains("`data.pkl` is compressed"));

    assert!(refusal(&archive(&[("a/data.pkl", &pickle())], stored())).contains("lacks the storage `7`"));
    assert!(refusal(&archive(&[("a/version", b"3")], stored())).contains("no data.pkl"));
    assert!(refusal(&archive(&[("metadata.pkl", &pickle())], stored())).contains("no data.pkl"));
    let two: [(&str, &[u8]); 2] = [("a/data.pkl", &pickle()), ("b/data.pkl", &pickle())];
    assert!(refusal(&archive(&two, stored())).contains("more than one data.pkl"));
}

#[test]
fn sizes_that_contradict_each_other_are_refused() {
    for n_elements in [7, 5, 1 << 62, i64::MAX] {
        let pickle = state_dict("x", &tensor("FloatStorage", "7", n_elements, 0, &[2], &[1]));
        let message = refusal(&archive(&[("a/data.pkl", &pickle), ("a/data/7", &values())], stored()));
        assert!(message.contains("storage"), "{message}");
    }
    // A tensor outside of its storage.
    let pickle = state_dict("x", &tensor("FloatStorage", "7", 6, 4, &[3], &[1]));
    let message = refusal(&archive(&[("a/data.pkl", &pickle), ("a/data/7", &values())], stored()));
    assert!(message.contains("outside of its storage"), "{message}");
    // An entry that claims to reach beyond the archive.
    let mut file = small_file();
    let directory = (0..file.len()).find(|&at| file[at..].starts_with(b"PK\x01\x02")).unwrap();
    for field in [20, 24] {
        file[directory + field + 2] = 0xff;
    }
    refusal(&file);
}

#[test]
fn a_name_that_two_entries_have_is_refused() {
    // Two names of one length, made one by changing a letter wherever it stands.
    let entries: [(&str, &[u8]); 3] =
        [("a/data.pkl", &pickle()), ("a/data/7", &values()), ("a/data/8", &values())];
    let mut file = archive(&entries, stored());
    for at in 0..file.len() - 8 {
        if file[at..].starts_with(b"a/data/8") {
            file[at + 7] = b'7';
        }
    }
    assert!(refusal(&file).contains("two entries of one name"));
}

#[test]
fn archives_of_the_64_bit_kind_are_read() {
    let entries: [(&str, &[u8]); 2] = [("a/data.pkl", &pickle()), ("a/data/7", &values())];
    let file = archive(&entries, stored().large_file(true));
    assert_eq!(open(&file).unwrap().f32("layer.weight", &[2, 3]).unwrap(), [0., 2., 4., 1., 3., 5.]);
    // Its directory's place, in 64 bits, far outside of the file.
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        writer.start_file(name, stored().large_file(true)).unwrap();
        writer.write_all(bytes).unwrap();
    }
    let mut file = writer.finish().unwrap().into_inner();
    let end = (0..file.len()).rfind(|&at| file[at..].starts_with(b"PK\x05\x06")).unwrap();
    file[end + 16..end + 20].fill(0xff);
    refusal(&file);
}

#[test]
fn big_endian_files_and_other_archives_are_refused() {
    let entries: [(&str, &[u8]); 3] =
        [("a/data.pkl", &pickle()), ("a/byteorder", b"big"), ("a/data/7", &values())];
    assert!(refusal(&archive(&entries, stored())).contains("big-endian"));
    assert!(refusal(&archive(&[("setup.py", b"print()")], stored())).contains("no PyTorch checkpoint"));
}
