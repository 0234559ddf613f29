use std::fs;

use half::f16;
use safetensors::SafeTensors;

use super::*;

fn sample(n_rows: usize) -> (Vec<f32>, Vec<f16>, Vec<i8>) {
    let floats: Vec<f32> = (0..n_rows * 3).map(|i| i as f32 * 0.37 - 100.0).collect();
    let halves = floats[..6].iter().map(|&x| f16::from_f32(x)).collect();
    (floats, halves, vec![-128, -1, 0, 1, 127])
}

fn write_sample(path: &Path, n_rows: usize) {
    let (floats, halves, bytes) = sample(n_rows);
    let tensor =
        |name: &str, shape: &[usize], values| NamedTensor { name: name.into(), shape: shape.into(), values };
    let tensors = [
        tensor("bytes", &[5], Values::I8(&bytes)),
        tensor("floats", &[n_rows, 3], Values::F32(&floats)),
        tensor("rounded", &[2, 3], Values::F32AsF16(&floats[..6])),
        tensor("halves", &[2, 3], Values::F16(&halves)),
        tensor("step", &[], Values::U64(&[123_456])),
    ];
    let metadata = BTreeMap::from([("recipe".into(), "a = \"b\"\n".into()), ("format".into(), "pt".into())]);
    write_safetensors(path, &tensors, &metadata).unwrap();
}

#[test]
fn what_is_written_is_read_back_here_and_by_the_formats_own_crate() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    write_sample(&path, 5000);
    let (floats, halves, bytes) = sample(5000);
    let file = Safetensors::open(&path).unwrap();
    assert_eq!(file.read_f32("floats").unwrap(), floats);
    let halves: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
    assert_eq!(file.read_f32("halves").unwrap(), halves);
    assert_eq!(file.read_f32("rounded").unwrap(), halves);
    assert_eq!(file.tensor("bytes").unwrap().bytes(), [128, 255, 0, 1, 127]);
    assert_eq!(file.read_f32("bytes").unwrap(), bytes.iter().map(|&b| f32::from(b)).collect::<Vec<_>>());
    assert_eq!(file.read_f32("step").unwrap(), [123_456.0]);
    assert_eq!(file.metadata()["recipe"], "a = \"b\"\n");
    let mut row = [0.0; 3];
    file.read_row_f32("floats", 4999, &mut row).unwrap();
    assert_eq!(row, floats[4999 * 3..]);
    file.finish().unwrap();

    let stored = fs::read(&path).unwrap();
    let theirs = SafeTensors::deserialize(&stored).unwrap();
    assert_eq!(theirs.tensor("floats").unwrap().shape(), [5000, 3]);
    assert_eq!(theirs.tensor("floats").unwrap().data()[4..8], floats[1].to_le_bytes());
    assert_eq!(
        theirs.tensor("floats").unwrap().data().as_ptr().align_offset(4),
        stored.as_ptr().align_offset(4)
    );
    write_sample(&path, 5000);
    assert_eq!(fs::read(&path).unwrap(), stored, "the same arguments gave other bytes");
}

#[test]
fn unused_missing_and_misshapen_tensors_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    write_sample(&path, 5000);
    let file = Safetensors::open(&path).unwrap();
    let error = file.tensor("floats").unwrap().expect_shape("floats", &[3, 5000]).unwrap_err();
    assert!(matches!(error, Error::TensorShape { ref name, .. } if name == "floats"), "{error}");
    assert!(file.contains("step") && file.shape("step").unwrap().is_empty());
    file.ignore(|name| name == "step");
    let Err(Error::UnusedTensors { names }) = file.finish() else { panic!("nothing was missed") };
    assert_eq!(names, ["bytes", "halves", "rounded"]);
    assert!(matches!(file.read_f32("absent"), Err(Error::MissingTensor { name }) if name == "absent"));
}

#[test]
fn a_stream_of_another_length_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let about = |name: &str| TensorAbout { name: name.into(), shape: vec![2], encoding: Encoding::Bf16 };
    let tensors = [about("b"), about("a")];
    stream_safetensors(&path, &tensors, &BTreeMap::new(), |i, file| file.write_all(&[i as u8; 4])).unwrap();
    let file = Safetensors::open(&path).unwrap();
    assert_eq!(file.tensor("a").unwrap().bytes(), [1; 4]);
    assert_eq!(file.tensor("b").unwrap().bytes(), [0; 4]);
    for n_bytes in [3, 5] {
        let other = folder.path().join("other.safetensors");
        let write = |_: usize, file: &mut dyn std::io::Write| file.write_all(&[0; 5][..n_bytes]);
        let error = stream_safetensors(&other, &tensors, &BTreeMap::new(), write).unwrap_err().to_string();
        assert!(error.contains("`b`") || error.contains("`a`"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

#[test]
fn shards_are_one_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (name, value) in [("one", 1.0), ("two", 2.0)] {
        let values = [value];
        let tensor = NamedTensor::f32(name, [1], &values);
        write_safetensors(at(&format!("{name}.safetensors")), &[tensor], &BTreeMap::new()).unwrap();
    }
    let index = r#"{"metadata": {}, "weight_map": {"one": "one.safetensors", "two": "two.safetensors"}}"#;
    fs::write(at("model.safetensors.index.json"), index).unwrap();
    for path in [folder.path().into(), at("model.safetensors.index.json")] {
        let checkpoint = Safetensors::open(&path).unwrap();
        assert_eq!(checkpoint.read_f32("one").unwrap(), [1.0]);
        assert_eq!(checkpoint.read_f32("two").unwrap(), [2.0]);
    }
    let twice = Safetensors::open_files(&[at("one.safetensors"), at("one.safetensors")]).unwrap_err();
    assert!(twice.to_string().contains("`one` is also in"), "{twice}");
    let outside = r#"{"weight_map": {"one": "../one.safetensors"}}"#;
    fs::write(at("model.safetensors.index.json"), outside).unwrap();
    assert!(Safetensors::open(folder.path()).unwrap_err().to_string().contains("not a plain file name"));
    fs::remove_file(at("model.safetensors.index.json")).unwrap();
    let error = || Safetensors::open(folder.path()).unwrap_err().to_string();
    assert!(error().contains("neither model.safetensors") && !error().contains("convert"), "{}", error());
    fs::write(at("pytorch_model.bin"), b"PK").unwrap();
    let remedy =
        format!("pytorch_model.bin, which can hold programs: `blip2 convert {}", folder.path().display());
    assert!(error().contains(&remedy), "{}", error());
}

#[test]
fn an_index_is_held_to_what_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (shard, names) in [("one", &["a", "b"][..]), ("two", &["c"])] {
        let tensors: Vec<_> = names.iter().map(|name| NamedTensor::f32(*name, [1], &[1.0])).collect();
        write_safetensors(at(&format!("{shard}.safetensors")), &tensors, &BTreeMap::new()).unwrap();
    }
    fs::write(at(INDEX_NAME), vec![b' '; 17 << 20]).unwrap();
    let error = Safetensors::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains(INDEX_NAME) && error.contains("has 17825792 bytes"), "{error}");
    let refused = |weight_map: &[(&str, &str)]| {
        let weight_map: BTreeMap<_, _> = weight_map.iter().copied().collect();
        fs::write(at(INDEX_NAME), serde_json::json!({"weight_map": weight_map}).to_string()).unwrap();
        Safetensors::open(folder.path()).map(|_| ()).map_err(|error| error.to_string())
    };
    let (one, two) = ("one.safetensors", "two.safetensors");
    let all = [("a", one), ("b", one), ("c", two)];
    refused(&all).unwrap();
    for (weight_map, words) in [
        (
            &[("a", one), ("b", one), ("c", "three.safetensors"), ("d", "four.safetensors")][..],
            &[INDEX_NAME, "of its 3 shards", "four.safetensors, three.safetensors"][..],
        ),
        (
            &[("a", one), ("b", one), ("c", two), ("d", two)],
            &[INDEX_NAME, "`d` is in two.safetensors, but it is not"],
        ),
        (&[("a", one), ("b", two), ("c", two)], &["`b` is in two.safetensors, but it is in one.safetensors"]),
        (&[("a", one), ("c", two)], &["one.safetensors", "holds the tensor `b`", INDEX_NAME]),
        (&[], &[INDEX_NAME, "lists no tensors"]),
    ] {
        let error = refused(weight_map).unwrap_err();
        words.iter().for_each(|word| assert!(error.contains(word), "`{word}` is not in: {error}"));
    }
}

fn header(json: &str, n_data: usize) -> Vec<u8> {
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend(json.as_bytes());
    file.resize(file.len() + n_data, 0);
    file
}

#[test]
fn what_is_not_a_sound_file_is_refused_by_name_and_reason() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.bin");
    let mut huge = u64::MAX.to_le_bytes().to_vec();
    huge.extend(b"{\"a\":1}");
    let overflow = r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,8]}}"#;
    let misfit = r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#;
    for (bytes, expected) in [
        (b"<!DOCTYPE html>\n<html>".to_vec(), "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00".to_vec(), "git lfs pull"),
        (b"PK\x03\x04\x00\x00\x00\x00\x00\x00\x00\x00".to_vec(), "zip archive"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.".to_vec(), "pickle"),
        (b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00".to_vec(), "GGUF"),
        (b"{\"architectures\": []}".to_vec(), "JSON text"),
        (b"abc".to_vec(), "cut short"),
        (b"some other text altogether".to_vec(), "not a safetensors file"),
        (huge, "the header claims"),
        // Large enough for its header, which no model needs: parsing it would take a hundred times the memory.
        (header(&format!("{{{}", " ".repeat(17 << 20)), 0), "the header claims 17825793 bytes"),
        (
            header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#, 16),
            "before its first tensor, `a`",
        ),
        (header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4000000000]}}"#, 8), "invalid shape"),
        (header(misfit, 8)[..20].to_vec(), "cut short inside the header"),
        (header(misfit, 8), "invalid shape"),
        (header(overflow, 8), "overflow"),
        (header("{nonsense", 8), "JSON"),
        (header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 7), "cut short or overlong"),
        (header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 9), "cut short or overlong"),
    ] {
        fs::write(&path, bytes).unwrap();
        let error = Safetensors::open(&path).unwrap_err().to_string();
        assert!(error.contains("model.bin: ") && error.contains(expected), "expected {expected:?}: {error}");
    }
    fs::write(&path, header(r#"{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}"#, 2)).unwrap();
    let error = Safetensors::open(&path).unwrap().read_f32("a").unwrap_err().to_string();
    assert!(error.contains("tensor `a` holds F8_E4M3"), "{error}");
}

/// The format: "Duplicate keys are disallowed", and "The byte buffer needs to be entirely indexed, and cannot contain holes".
#[test]
fn tensors_of_one_name_and_bytes_of_two_or_of_none_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let of = |tensors: &[(&str, u64, u64)]| {
        let entry = |(name, start, end): &(&str, u64, u64)| {
            format!(r#""{name}":{{"dtype":"U8","shape":[{}],"data_offsets":[{start},{end}]}}"#, end - start)
        };
        let json = tensors.iter().map(entry).collect::<Vec<_>>().join(",");
        let n_data = tensors.iter().map(|(_, _, end)| *end).max().unwrap_or(0);
        fs::write(&path, header(&format!("{{{json}}}"), n_data as usize)).unwrap();
        Safetensors::open(&path).map(|_| ()).map_err(|error| error.to_string())
    };
    of(&[("b", 4, 8), ("empty", 4, 4), ("a", 0, 4)]).unwrap();
    for (tensors, expected) in [
        // The second would be read in the place of the first, whose bytes are those of `b`.
        (
            &[("a", 0, 4), ("b", 4, 8), ("a", 4, 8)][..],
            "two tensors of one name: `a` (bytes 0 to 4) and `a` (bytes 4",
        ),
        (
            &[("a", 0, 4), ("\\u0061", 0, 4)],
            "two tensors of one name: `a` (bytes 0 to 4) and `a` (bytes 0 to 4)",
        ),
        (&[("a", 0, 4), ("b", 0, 4)], "`a` (bytes 0 to 4) and `b` (bytes 0 to 4) overlap"),
        (&[("c", 6, 10), ("a", 0, 4), ("b", 2, 6)], "`a` (bytes 0 to 4) and `b` (bytes 2 to 6) overlap"),
        (
            &[("a", 0, 4), ("b", 6, 8)],
            "between the tensors `a` (bytes 0 to 4) and `b` (bytes 6 to 8) are of none",
        ),
    ] {
        let error = of(tensors).unwrap_err();
        let names_file = error.contains("model.safetensors: ");
        assert!(names_file && error.contains(expected), "expected {expected:?}: {error}");
    }
}

#[test]
fn a_cut_file_is_refused_and_a_flipped_bit_never_panics() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    write_sample(&path, 20);
    let bytes = fs::read(&path).unwrap();
    let header_len = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let cut = folder.path().join("cut.safetensors");
    for len in 1..bytes.len() {
        fs::write(&cut, &bytes[..len]).unwrap();
        assert!(Safetensors::open(&cut).is_err(), "accepted {len} of {} bytes", bytes.len());
    }
    for bit in 0..header_len * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        fs::write(&cut, &damaged).unwrap();
        if let Ok(file) = Safetensors::open(&cut) {
            let names: Vec<_> = file.names().map(String::from).collect();
            for name in names {
                let _ = file.read_f32(&name); // a value or an error, not a panic
            }
        }
    }
}
