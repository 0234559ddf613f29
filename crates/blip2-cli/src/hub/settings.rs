//! Where the hub and its cache are: the environment variables of Hugging Face's own tools.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

const ENDPOINT: &str = "https://huggingface.co";

/// What the environment says about the hub. It has no `Debug`: a token is not to be printed.
pub(crate) struct Settings {
    /// The folder with a folder for each model.
    pub(super) cache: PathBuf,
    /// Address of the hub, without a slash at its end.
    pub(super) endpoint: String,
    pub(super) token: Option<String>,
    /// Nothing is to be asked of the network.
    pub(super) is_offline: bool,
    /// A file with the certificates to trust instead of the built-in ones.
    pub(super) certificates: Option<PathBuf>,
    pub(super) shows_progress: bool,
}

impl Settings {
    /// Reads the environment.
    ///
    /// # Errors
    /// When no cache folder can be named, the address is none, or the token's file cannot be read.
    pub(crate) fn from_env() -> anyhow::Result<Self> {
        Self::read(&|name| env::var_os(name))
    }

    fn read(variable: &dyn Fn(&str) -> Option<OsString>) -> anyhow::Result<Self> {
        let given = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = |name: &str| -> anyhow::Result<Option<String>> {
            given(name)
                .map(|value| value.into_string().map_err(|_| anyhow::anyhow!("{name} is not Unicode text")))
                .transpose()
        };
        let is_on = |name: &str| {
            let value = given(name).map(|value| value.to_string_lossy().to_ascii_uppercase());
            value.is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&&*value))
        };
        let user = given("HOME").or_else(|| given("USERPROFILE")).map(PathBuf::from);
        let folder = |name: &str| {
            given(name).map(|value| match (Path::new(&value).strip_prefix("~"), &user) {
                (Ok(rest), Some(user)) => user.join(rest),
                _ => PathBuf::from(value),
            })
        };
        let home = folder("HF_HOME")
            .or_else(|| folder("XDG_CACHE_HOME").map(|base| base.join("huggingface")))
            .or_else(|| user.as_ref().map(|user| user.join(".cache/huggingface")));
        let cache = folder("HF_HUB_CACHE")
            .or_else(|| folder("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| home.as_ref().map(|home| home.join("hub")))
            .context("no folder for models of the hub: set HF_HOME to one")?;
        let endpoint = text("HF_ENDPOINT")?.unwrap_or_else(|| ENDPOINT.into());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        if !["https://", "http://"].iter().any(|scheme| endpoint.starts_with(scheme)) {
            bail!("HF_ENDPOINT is `{endpoint}`, expected an address like {ENDPOINT}");
        }
        let token = match text("HF_TOKEN")?.or(text("HUGGING_FACE_HUB_TOKEN")?) {
            Some(token) => Some(token),
            None if is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN") => None,
            None => {
                let file = folder("HF_TOKEN_PATH").or_else(|| home.map(|home| home.join("token")));
                file.map(|file| read_token(&file)).transpose()?.flatten()
            }
        };
        Ok(Self {
            cache,
            endpoint,
            token: token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()),
            is_offline: is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE"),
            certificates: folder("SSL_CERT_FILE").or_else(|| folder("REQUESTS_CA_BUNDLE")),
            shows_progress: !is_on("HF_HUB_DISABLE_PROGRESS_BARS"),
        })
    }
}

fn read_token(file: &Path) -> anyhow::Result<Option<String>> {
    match fs::read_to_string(file) {
        Ok(token) => Ok(Some(token)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => {
            Err(error).with_context(|| format!("the hub's token cannot be read from {}", file.display()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> anyhow::Result<Settings> {
        Settings::read(&|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into())
        })
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        for (variables, expected) in [
            (&[("HOME", "/u")][..], "/u/.cache/huggingface/hub"),
            (&[("HOME", "/u"), ("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("HOME", "/u"), ("HF_HOME", "~/hf")], "/u/hf/hub"),
            (&[("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old")], "/old"),
            (&[("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/new")], "/new"),
            (&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "")], "/hf/hub"),
        ] {
            assert_eq!(read(variables).unwrap().cache, Path::new(expected), "{variables:?}");
        }
        assert!(read(&[]).err().unwrap().to_string().contains("HF_HOME"));
    }

    #[test]
    fn the_token_comes_from_the_environment_or_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        assert_eq!(read(&[("HF_HOME", home)]).unwrap().token, None);
        fs::write(folder.path().join("token"), "hf_file\n").unwrap();
        assert_eq!(read(&[("HF_HOME", home)]).unwrap().token.unwrap(), "hf_file");
        assert_eq!(read(&[("HF_HOME", home), ("HF_TOKEN", " hf_set\n")]).unwrap().token.unwrap(), "hf_set");
        assert_eq!(read(&[("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).unwrap().token, None);
        let elsewhere = folder.path().join("absent");
        let elsewhere = elsewhere.to_str().unwrap();
        assert_eq!(read(&[("HF_HOME", home), ("HF_TOKEN_PATH", elsewhere)]).unwrap().token, None);
    }

    #[test]
    fn switches_and_addresses() {
        let is_offline = |value| read(&[("HOME", "/u"), ("HF_HUB_OFFLINE", value)]).unwrap().is_offline;
        assert!(is_offline("1") && is_offline("true") && !is_offline("0") && !is_offline(""));
        let endpoint =
            |value| read(&[("HOME", "/u"), ("HF_ENDPOINT", value)]).map(|settings| settings.endpoint);
        assert_eq!(endpoint("http://127.0.0.1:80/").unwrap(), "http://127.0.0.1:80");
        assert_eq!(endpoint("").unwrap(), ENDPOINT);
        assert!(endpoint("huggingface.co").unwrap_err().to_string().contains("HF_ENDPOINT"));
    }
}
