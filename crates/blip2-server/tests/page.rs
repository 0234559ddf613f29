//! The page: every file that it names is here and of its kind, nothing in it comes from elsewhere or is code in the markup.

mod support;

use std::collections::BTreeSet;
use std::path::Path;

use support::{Response, TestServer, config};

/// The texts between `before` and the next quotation mark.
fn quoted<'a>(text: &'a str, before: &str) -> Vec<&'a str> {
    text.split(before).skip(1).filter_map(|rest| rest.split('"').next()).collect()
}

/// The tags of a page, without their brackets.
fn tags(html: &str) -> Vec<&str> {
    html.split('<').skip(1).filter_map(|rest| rest.split('>').next()).collect()
}

fn assert_is_page_of_its_own(path: &str, page: &Response) {
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    let policy = page.header("content-security-policy").expect("a policy");
    let directives: Vec<(&str, &str)> =
        policy.split(';').filter_map(|directive| directive.trim().split_once(' ')).collect();
    let sources =
        |name: &str| directives.iter().find(|(found, _)| *found == name).map(|(_, sources)| *sources);
    for (name, expected) in [
        ("default-src", "'none'"),
        ("script-src", "'self'"),
        ("style-src", "'self'"),
        ("connect-src", "'self'"),
        ("img-src", "'self' blob: data:"),
        ("frame-ancestors", "'none'"),
        ("form-action", "'none'"),
        ("base-uri", "'none'"),
        ("require-trusted-types-for", "'script'"),
    ] {
        assert_eq!(sources(name), Some(expected), "{path} {name}");
    }
    let html = page.text();
    assert!(!html.contains("://") && !html.contains("javascript:"), "{path} names nothing elsewhere");
    for tag in tags(&html) {
        let mut words = tag.split_ascii_whitespace();
        let name = words.next().unwrap_or_default();
        assert_ne!(name, "style", "{path} has no style in its markup");
        assert!(name != "script" || tag.contains("src=\""), "{path} has no script in its markup");
        for attribute in words {
            let is_handler = attribute.starts_with("on") && attribute.contains('=');
            assert!(!is_handler && !attribute.starts_with("style="), "{path}: <{tag}>");
        }
    }
}

#[test]
fn all_that_the_pages_refer_to_is_served() {
    let server = TestServer::start("blip2_opt", config());
    let mut referred = BTreeSet::new();
    for path in ["/", "/docs"] {
        let page = server.get(path);
        assert_is_page_of_its_own(path, &page);
        let html = page.text();
        for name in quoted(&html, "src=\"").into_iter().chain(quoted(&html, "href=\"")) {
            if let Some(name) = name.strip_prefix("static/") {
                referred.insert(name.to_owned());
            } else {
                assert_eq!(server.get(&format!("/{name}")).status, 200, "{path} refers to {name}");
            }
        }
    }
    let mut seen = BTreeSet::new();
    while let Some(name) = referred.pop_first() {
        let file = server.get(&format!("/static/{name}"));
        assert_eq!(file.status, 200, "{name}");
        assert!(file.header("content-security-policy").is_some_and(|policy| policy.contains("'none'")));
        let expected = match Path::new(&name).extension().and_then(|extension| extension.to_str()) {
            Some("mjs" | "js") => "text/javascript; charset=utf-8",
            Some("css") => "text/css; charset=utf-8",
            Some("svg") => "image/svg+xml",
            other => panic!("{name} is of an unknown kind: {other:?}"),
        };
        assert_eq!(file.header("content-type"), Some(expected), "{name}");
        let text = file.text();
        seen.insert(name);
        referred.extend(
            quoted(&text, "from \"./").into_iter().filter(|name| !seen.contains(*name)).map(str::to_owned),
        );
    }
    assert!(seen.contains("words.mjs") && seen.contains("page.css"), "{seen:?}");
    // Nothing lies there that no page uses, and nothing that is used is missing from the binary.
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/static");
    let there: BTreeSet<String> = folder
        .read_dir()
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .filter(|name| !["index.html", "docs.html", "openapi.json"].contains(&name.as_str()))
        .collect();
    assert_eq!(seen, there);
}

#[test]
fn other_names_are_no_files() {
    let server = TestServer::start("blip2_opt", config());
    for name in ["nothing.js", "openapi.json", "..%2Fpage.rs", "%00", "MAIN.MJS"] {
        assert_eq!(server.get(&format!("/static/{name}")).error_code(), "not_found", "{name}");
    }
}
