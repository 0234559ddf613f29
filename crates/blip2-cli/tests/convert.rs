//! `blip2 convert` from the command line: what it writes, says and refuses.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../blip2/tests/golden").join(name)
}

fn convert(arguments: &[&Path]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_blip2"))
        .arg("convert")
        .args(arguments)
        .output()
        .expect("the command runs")
}

fn said(output: &Output, status: i32) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(output.stdout.is_empty() && !said.contains("panicked"), "{said}");
    said
}

#[test]
fn a_lavis_checkpoint_goes_there_and_back() {
    let work = tempfile::tempdir().expect("a folder");
    let [folder, back] = ["itm", "back.pth"].map(|name| work.path().join(name));
    let (lavis, vocabulary) = (golden("lavis/stage1.pth"), golden("lavis/vocab.txt"));
    let config = golden("blip2_opt/config.json");
    let output =
        convert(&[&lavis, &folder, Path::new("--vocabulary"), &vocabulary, Path::new("--config"), &config]);
    assert!(said(&output, 0).contains("itm: 133 tensors"));
    assert!(said(&convert(&[&folder, &back]), 0).contains("back.pth: 138 tensors"));
    let names = ["model.safetensors", "config.json", "vocab.txt", "preprocessor_config.json"];
    assert!(names.iter().all(|name| folder.join(name).exists()));
}

#[test]
fn what_cannot_be_done_is_one_line() {
    let work = tempfile::tempdir().expect("a folder");
    let out = work.path().join("out");
    let (payload, lavis, opt) = (golden("torch_payload.pth"), golden("lavis/opt.pth"), golden("blip2_opt"));
    let [file, absent] = ["out.safetensors", "absent.pth"].map(|name| work.path().join(name));
    let flag = |name: &'static str| Path::new(name);
    for (arguments, status, words) in [
        (vec![payload.as_path(), &out], 1, "`posix.system`"),
        (vec![&lavis, &out], 1, "eva_vit_g.pth"),
        (vec![&lavis, &file, flag("--vit"), &lavis], 2, "--to hf"),
        (vec![&opt, &file, flag("--to"), flag("hf")], 2, "must be a folder"),
        (vec![&opt, &out, flag("--to"), flag("lavis")], 2, ".pth or .safetensors"),
        (vec![&opt, &out, flag("--to"), flag("as-is")], 2, "must end in .safetensors"),
        (vec![&absent, &out], 1, "absent.pth"),
    ] {
        let said = said(&convert(&arguments), status);
        assert!(said.contains(words), "{words}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    }
    assert_eq!(std::fs::read_dir(work.path()).expect("readable").count(), 0, "something was left behind");
}
