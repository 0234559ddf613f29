//! Addresses that have been smuggled past such filters, and hosts that lead elsewhere.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

fn fetcher(domains: &[&str]) -> Fetcher {
    let domains: Vec<String> = domains.iter().map(ToString::to_string).collect();
    Fetcher::new(&domains, 1000)
}

#[test]
fn only_the_public_network_is_public() {
    for address in [
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "10.255.255.255",
        "100.64.0.1",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.255.254",
        "169.254.0.1",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.1",
        "192.0.0.170",
        "192.0.2.1",
        "192.31.196.1",
        "192.52.193.1",
        "192.88.99.1",
        "192.168.0.1",
        "192.168.255.255",
        "198.18.0.1",
        "198.19.255.255",
        "198.51.100.7",
        "203.0.113.9",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:8.8.8.8",
        "::8.8.8.8",
        "64:ff9b::7f00:1",
        "64:ff9b::808:808",
        "64:ff9b:1::1",
        "100::1",
        "2001::1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "2001:2::1",
        "2001:10::1",
        "2001:20::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:808:808::1",
        "2620:4f:8000::1",
        "3fff::1",
        "4000::1",
        "5f00::1",
        "fc00::1",
        "fd12:3456::1",
        "fe80::1",
        "fec0::1",
        "ff02::1",
    ] {
        assert!(!is_public(address.parse().expect("an address")), "{address}");
    }
    for address in [
        "1.1.1.1",
        "8.8.8.8",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "126.0.0.1",
        "128.0.0.1",
        "169.253.1.1",
        "172.15.0.1",
        "172.32.0.1",
        "192.0.1.1",
        "192.167.1.1",
        "198.17.0.1",
        "198.20.0.1",
        "223.255.255.255",
        "2001:200::1",
        "2001:4860:4860::8888",
        "2606:4700::1111",
        "2a00:1450::1",
        "3ffe::1",
    ] {
        assert!(is_public(address.parse().expect("an address")), "{address}");
    }
}

/// Forms in which addresses of the own network have been smuggled past filters: nothing of it is ever connected to.
#[test]
fn no_form_of_an_inner_address_passes() {
    let fetcher = fetcher(&["*"]);
    let hosts = [
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "0",
        "0.0.0.0",
        "2130706433",
        "017700000001",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "0x7f.0x0.0x0.0x1",
        "127.000.000.001",
        "localhost",
        "LOCALHOST",
        "LocalHost",
        "10.0.0.1",
        "167772161",
        "192.168.1.1",
        "3232235777",
        "169.254.169.254",
        "2852039166",
        "0xa9fea9fe",
        "[::1]",
        "[::]",
        "[0:0:0:0:0:0:0:1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "[fe80::1]",
        "[fd00::1]",
        "[fec0::1]",
        "255.255.255.255",
        "224.0.0.1",
        "100.64.0.1",
        "198.18.0.1",
    ];
    for host in hosts {
        for url in
            [format!("http://{host}/x.png"), format!("https://{host}:443/x.png"), format!("HTTP://{host}/")]
        {
            let refusal = fetcher.follow(&url).expect_err(&url);
            assert!([Refusal::Unreachable, Refusal::Malformed].contains(&refusal), "{url}: {refusal:?}");
        }
    }
    for url in [
        "",
        "cat.jpg",
        "/etc/passwd",
        "file:///etc/passwd",
        "ftp://example.org/x",
        "gopher://example.org/",
        "http:/example.org",
        "http:example.org",
        "http://",
        "http:///x",
        "https://user@example.org/",
        "https://user:word@example.org/",
        "http://example.org@127.0.0.1/",
        "http://127.0.0.1\\@example.org/",
        "http://example.org\\.evil.org/",
        "http://example.org:8080/",
        "http://example.org:443/",
        "https://example.org:80/",
        "https://example.org:22/",
        "http://example.org:/",
        "http://example.org:0/",
        "http://example.org.:80/",
        "http://example.org./",
        "http://.example.org/",
        "http://exämple.org/",
        "http://example.org/\u{202e}x",
        "http://example.org/a b",
        "http://example.org/\r\nHost: x",
        "http://example.org\t/",
        " http://example.org/",
        "http://example.org%2f@evil/",
        "http://[::1",
        "http://[fe80::1%25eth0]/",
        "http://[::1]x/",
        "//example.org/x",
        "javascript:alert(1)",
        "http://:80/",
    ] {
        assert_eq!(fetcher.check(url).map(|uri| uri.to_string()), Err(Refusal::Malformed), "{url:?}");
    }
    assert_eq!(
        fetcher.check(&format!("http://example.org/{}", "a".repeat(2048))).err(),
        Some(Refusal::Malformed)
    );
}

#[test]
fn only_the_named_domains_are_asked() {
    let fetcher = fetcher(&["example.org", "*.pictures.net"]);
    for url in [
        "http://example.org/a.png",
        "https://EXAMPLE.org:443/a?b#c",
        "https://a.pictures.net/",
        "https://a.b.pictures.net/x",
    ] {
        assert!(fetcher.check(url).is_ok(), "{url}");
    }
    for url in [
        "http://www.example.org/",
        "http://example.org.evil.net/",
        "http://evilexample.org/",
        "http://pictures.net/",
        "http://evilpictures.net/",
        "http://8.8.8.8/",
        "http://[2001:4860:4860::8888]/",
    ] {
        assert_eq!(fetcher.check(url).err(), Some(Refusal::Domain), "{url}");
    }
}

/// A host on this machine that answers every path with what `answer` says, and counts its connections.
fn host(answer: impl Fn(&str) -> String + Send + 'static) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let n_connections = Arc::new(AtomicUsize::new(0));
    let count = n_connections.clone();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            count.fetch_add(1, Ordering::SeqCst);
            let mut request = [0; 4096];
            let n = stream.read(&mut request).unwrap_or(0);
            let request = String::from_utf8_lossy(&request[..n]).into_owned();
            let path = request.split(' ').nth(1).unwrap_or("/").to_owned();
            let _ = stream.write_all(answer(&path).as_bytes());
        }
    });
    (port, n_connections)
}

/// Fetches from this machine, as if it were public.
fn local(port: u16, is_allowed: fn(IpAddr) -> bool) -> Fetcher {
    let resolver = PublicResolver { is_allowed, look_up };
    let fetcher = Fetcher::with_resolver(&["localhost".to_owned()], 1000, resolver);
    Fetcher { ports: [port, 443], ..fetcher }
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
}

#[test]
fn every_redirect_goes_through_the_same_door() {
    let redirect = |to: &str| {
        format!("HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
    };
    let (port, n_connections) = host(move |path| match path {
        "/picture" => ok("a picture"),
        "/here" => redirect("/picture"),
        "/twice" => redirect("/here"),
        "/round" => redirect("/round"),
        "/elsewhere" => redirect("http://evil.example/"),
        "/inside" => redirect("http://127.0.0.1/"),
        "/file" => redirect("file:///etc/passwd"),
        "/relative" => redirect("picture"),
        "/large" => ok(&"x".repeat(1001)),
        "/endless" => format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{}", "x".repeat(100_000)),
        _ => "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".into(),
    });
    let fetcher = local(port, |address| address.is_loopback());
    let get = |path: &str| fetcher.follow(&format!("http://localhost:{port}{path}"));
    for path in ["/picture", "/here", "/twice"] {
        assert_eq!(get(path).as_deref(), Ok(&b"a picture"[..]), "{path}");
    }
    for (path, refusal) in [
        ("/round", Refusal::Redirects),
        ("/elsewhere", Refusal::Domain),
        ("/inside", Refusal::Domain),
        ("/file", Refusal::Malformed),
        ("/relative", Refusal::Redirects),
        ("/large", Refusal::TooLarge),
        ("/endless", Refusal::TooLarge),
        ("/nothing", Refusal::Status),
    ] {
        assert_eq!(get(path), Err(refusal), "{path}");
    }
    let before = n_connections.load(Ordering::SeqCst);
    let refused = local(port, is_public).follow(&format!("http://localhost:{port}/picture"));
    assert_eq!(refused, Err(Refusal::Unreachable));
    assert_eq!(n_connections.load(Ordering::SeqCst), before, "an inner address is not even connected to");
}

#[test]
fn a_name_whose_servers_say_nothing_takes_no_longer_than_allowed() {
    const SLOW: Duration = Duration::from_secs(2);
    let (port, n_connections) = host(|_| ok("a picture"));
    let resolver = PublicResolver {
        is_allowed: |address| address.is_loopback(),
        look_up: |name| {
            std::thread::sleep(SLOW);
            look_up(name)
        },
    };
    let fetcher = Fetcher::with_resolver(&["localhost".to_owned()], 1000, resolver);
    let fetcher = Fetcher { ports: [port, 443], longest: Duration::from_millis(200), ..fetcher };
    let start = Instant::now();
    let refused = fetcher.follow(&format!("http://localhost:{port}/picture"));
    let took = start.elapsed();
    assert_eq!(refused, Err(Refusal::Unreachable));
    assert!((Duration::from_millis(200)..SLOW).contains(&took), "{took:?}");
    assert_eq!(n_connections.load(Ordering::SeqCst), 0);
    // With a deadline that the name keeps.
    let fetcher = Fetcher { longest: Duration::from_secs(60), ..fetcher };
    assert_eq!(fetcher.follow(&format!("http://localhost:{port}/picture")).as_deref(), Ok(&b"a picture"[..]));
}
