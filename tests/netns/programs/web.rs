//! nginx with sendfile, with TLS, as a place to put files; read by curl and wrk, directly and through HAProxy that splices.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use culvert_harness::{Pod, Proc};

use crate::made;
use crate::stage::{End, Least, Mode, STEP, Stage, compare};
use crate::transcript::Transcript;

const SENDFILE: u16 = 8080;
/// The same without sendfile.
const COPIED: u16 = 8081;
const TLS: u16 = 8443;
const PROXY: u16 = 8090;

const ROUTES: [(End, End, u16); 3] = [
    (End::Client, End::Server, SENDFILE),
    (End::Client, End::Server, COPIED),
    (End::Client, End::Server, TLS),
];

/// It gives up what makes no progress for five seconds.
const CURL: &str = "curl -sS --speed-limit 1 --speed-time 5";

/// What curl tells of each transfer, whatever its way.
const TOLD: &str = "-w '%{stderr}%{http_code} %{size_download} down %{size_upload} up, exit %{exitcode} %{errormsg}\\n'";

fn least(direct: u32, short: u64) -> Least {
    Least { direct, short }
}

pub fn large_file(mode: Mode) -> Result<()> {
    let file = made::large_file()?;
    compare(mode, &ROUTES, least(5, 0), |stage, told| {
        let _server = serve(stage, &file)?;
        for port in [SENDFILE, COPIED] {
            fetch(stage, told, &format!("port {port}"), &stage.server.at(port))?;
        }
        // Several at once, and a part of it.
        let url = format!("http://{}/large", stage.server.at(SENDFILE));
        let three = format!("for i in 1 2 3; do curl -sS {url} | sha256sum & done; wait");
        told.say("three at once", stage.shell(&three)?);
        told.say(
            "part",
            stage.shell(&format!("curl -sS -r 1000-99999999 {url} | sha256sum"))?,
        );
        Ok(())
    })
}

/// The large file must be what it is at the server, but for what may differ.
fn fetch(stage: &Stage, told: &mut Transcript, case: &str, from: &str) -> Result<()> {
    let said = stage.shell(&format!(
        "{{ {CURL} {TOLD} http://{from}/large || true; }} 2> {0}/told | sha256sum; cat {0}/told",
        stage.directory().display()
    ))?;
    let original = stage.shell(&format!("sha256sum < {}", made::large_file()?.display()))?;
    let is_same = stage.is_short() || said.starts_with(&original);
    ensure!(is_same, "{from}: {said}, not {original}");
    told.say(case, said);
    Ok(())
}

pub fn wrk(mode: Mode) -> Result<()> {
    let file = made::large_file()?;
    compare(mode, &ROUTES, least(32, 16), |stage, told| {
        let _server = serve(stage, &file)?;
        for (case, path, port, more) in [
            ("keep-alive", "small", SENDFILE, ""),
            (
                "connection each",
                "small",
                SENDFILE,
                "-H 'Connection: close'",
            ),
            ("100 KB", "middling", SENDFILE, ""),
            ("100 KB, copied", "middling", COPIED, ""),
        ] {
            let url = format!("http://{}/{path}", stage.server.at(port));
            let said = stage.shell(&format!("wrk -t 2 -c 32 -d 1 {more} {url}"))?;
            let bad = ["Socket errors", "Non-2xx"];
            let complaints = said
                .lines()
                .filter(|line| bad.iter().any(|word| line.contains(word)));
            let complaints: Vec<_> = complaints.map(str::trim).collect();
            let some = said.lines().find(|line| line.contains(" requests in "));
            ensure!(
                some.is_some_and(|line| !line.trim().starts_with("0 ")),
                "{said}"
            );
            told.say(case, format!("complaints: {complaints:?}"));
        }
        Ok(())
    })
}

pub fn curl(mode: Mode) -> Result<()> {
    let file = made::large_file()?;
    compare(mode, &ROUTES, least(10, 0), |stage, told| {
        let _server = serve(stage, &file)?;
        let (at, directory) = (
            stage.server.at(SENDFILE),
            stage.directory().display().to_string(),
        );
        let part = format!("head -c 30000000 {} > {directory}/part", file.display());
        stage.shell(&part)?;
        for (case, command) in [
            (
                "put",
                format!("{CURL} {TOLD} -T {directory}/part http://{at}/put/one"),
            ),
            (
                "put without a length",
                format!("{CURL} {TOLD} -T - http://{at}/put/two < {directory}/part"),
            ),
            (
                "put without waiting",
                format!("{CURL} {TOLD} -H Expect: -T {directory}/part http://{at}/put/three"),
            ),
            (
                "HTTP/1.0",
                format!("{CURL} {TOLD} --http1.0 http://{at}/middling | sha256sum"),
            ),
            (
                "many on one connection",
                format!("{CURL} {TOLD} 'http://{at}/middling?[1-50]' | sha256sum"),
            ),
            (
                "many at once",
                format!(
                    "{CURL} {TOLD} -Z 'http://{at}/middling?[1-50]' -o '{directory}/out#1' 2>&1 | grep -o '[0-9]* [0-9]* down.*'; sha256sum < {directory}/out1; cat {directory}/out* | sha256sum"
                ),
            ),
            (
                "head",
                format!("curl -sSI http://{at}/large | grep -v -i ^date"),
            ),
            (
                "nothing there",
                format!("curl -sS {TOLD} http://{at}/absent"),
            ),
            (
                "slowly",
                format!(
                    "curl -sS {TOLD} --limit-rate 50M -r 0-29999999 http://{at}/large | sha256sum"
                ),
            ),
            (
                "given up",
                format!("curl -sS -m 1 --limit-rate 1M http://{at}/large > /dev/null"),
            ),
        ] {
            // What is told on standard error comes after what is printed.
            told.say(
                case,
                stage
                    .shell(&format!(
                        "{{ {command} || echo exit $?; }} 2> {directory}/told; cat {directory}/told"
                    ))?
                    .lines()
                    .filter(|line| case != "given up" || line.starts_with("exit"))
                    .collect::<Vec<_>>()
                    .join("\n"),
            );
        }
        told.say(
            "kept",
            stage.shell(&format!(
                "cd {directory}/put && for name in one two three; do sha256sum $name 2> /dev/null || echo no $name; done"
            ))?,
        );
        Ok(())
    })
}

pub fn tls(mode: Mode) -> Result<()> {
    let file = made::large_file()?;
    compare(mode, &ROUTES, least(10, 0), |stage, told| {
        let _server = serve(stage, &file)?;
        let (at, directory) = (
            stage.server.at(TLS),
            stage.directory().display().to_string(),
        );
        for (case, command) in [
            (
                "TLS 1.3",
                format!("curl -sSk --tls-max 1.3 https://{at}/large | sha256sum"),
            ),
            (
                "TLS 1.2",
                format!("curl -sSk --tls-max 1.2 https://{at}/large | sha256sum"),
            ),
            (
                "many",
                format!("curl -sSk 'https://{at}/middling?[1-50]' | sha256sum"),
            ),
            (
                "put",
                format!(
                    "curl -sSk -T {directory}/key.pem https://{at}/put/tls && cmp {directory}/key.pem {directory}/put/tls"
                ),
            ),
            (
                "wrk",
                format!(
                    "wrk -t 2 -c 16 -d 1 https://{at}/small | grep -E 'Socket errors|Non-2xx' || echo fine"
                ),
            ),
        ] {
            told.say(case, stage.shell(&command)?);
        }
        told.say("kernel TLS", kernel_tls(&stage.server)?);
        Ok(())
    })
}

/// nginx asks for kernel TLS; whether it got it depends on the kernel and on OpenSSL.
fn kernel_tls(pod: &Pod) -> Result<String> {
    let stat = pod.command("cat").arg("/proc/net/tls_stat").run(STEP)?;
    if !stat.status.success() {
        return Ok("this kernel has none".to_owned());
    }
    let used = stat
        .stdout
        .lines()
        .any(|line| line.starts_with("TlsTx") && !line.ends_with("\t0"));
    Ok(if used { "used" } else { "not used" }.to_owned())
}

pub fn haproxy_copying(mode: Mode) -> Result<()> {
    haproxy(mode, "copy", "", 1)
}

pub fn haproxy_splicing(mode: Mode) -> Result<()> {
    // Where it finds it worth while, and always.
    haproxy(mode, "splice", "option splice-auto", 0)?;
    let always = "option splice-request\noption splice-response";
    haproxy(mode, "splice", always, 0)
}

fn haproxy(mode: Mode, how: &str, options: &str, short: u64) -> Result<()> {
    let file = made::large_file()?;
    let routes = [
        (End::Relay, End::Server, SENDFILE),
        (End::Client, End::Relay, PROXY),
    ];
    compare(mode, &routes, least(100, short), |stage, told| {
        let _server = serve(stage, &file)?;
        let directory = stage.directory().display().to_string();
        let _proxy = proxy(stage, options)?;
        stage.shell(&format!(
            "head -c 30000000 {} > {directory}/part",
            file.display()
        ))?;
        let at = stage.pod(End::Relay).at(PROXY);
        fetch(stage, told, &format!("large by {how}"), &at)?;
        for (case, command) in [
            (
                "put",
                format!(
                    "{CURL} -T {directory}/part http://{at}/put/one && sha256sum < {directory}/put/one"
                ),
            ),
            (
                "many",
                format!("{CURL} 'http://{at}/middling?[1-100]' | sha256sum"),
            ),
            (
                "connections",
                format!("for i in {{1..30}}; do {CURL} http://{at}/small | sha256sum; done"),
            ),
            (
                "wrk",
                format!(
                    "wrk -t 2 -c 16 -d 1 http://{at}/middling | grep -E 'Socket errors|Non-2xx' || echo fine"
                ),
            ),
        ] {
            let said = stage.shell(&format!("{command} || echo exit $?"))?;
            told.say(&format!("{case} by {how}"), said);
        }
        Ok(())
    })
}

fn proxy(stage: &Stage, options: &str) -> Result<Proc> {
    let file = stage.directory().join("haproxy.cfg");
    let server = stage.server.at(SENDFILE);
    let configuration = format!(
        "global\nnbthread 2\ndefaults\nmode tcp\ntimeout connect 10s\ntimeout client 30s\ntimeout server 30s\n\
         listen proxy\nbind :{PROXY}\n{options}\nserver one {server}\n"
    );
    write(&file, &configuration)?;
    let proxy = stage
        .pod(End::Relay)
        .command("haproxy")
        .args(["-db", "-f"])
        .arg(&file);
    stage.serve(End::Relay, PROXY, proxy)
}

/// nginx with a small, a middling and the large file.
fn serve(stage: &Stage, large: &Path) -> Result<Proc> {
    let directory = stage.directory().display().to_string();
    let large = large.display();
    stage.shell(&format!(
        "cd {directory} && rm -rf put && mkdir -p put files && ln -sf {large} files/large && head -c 100000 {large} > files/middling && \
         head -c 100 {large} > files/small && touch -d @0 files/small files/middling && {{ test -f key.pem || openssl req \
         -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=server -keyout key.pem -out \
         certificate.pem 2> /dev/null; }}"
    ))?;
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|kind| format!("{kind}_temp_path {directory}/{kind};\n"))
        .collect();
    let locations = format!(
        "location / {{ root {directory}/files; }}\n\
         location /put {{ root {directory}; dav_methods PUT; client_max_body_size 0; }}\n"
    );
    let configuration = format!(
        "daemon off;\nuser root;\nworker_processes 1;\npid {directory}/nginx.pid;\nerror_log stderr crit;\n\
         events {{ worker_connections 1024; }}\n\
         http {{\naccess_log off;\nkeepalive_requests 1000000000;\n{temporary}\
         server {{\nlisten {SENDFILE};\nsendfile on;\ntcp_nopush on;\n{locations}}}\n\
         server {{\nlisten {COPIED};\nsendfile off;\n{locations}}}\n\
         server {{\nlisten {TLS} ssl;\nsendfile on;\nssl_certificate {directory}/certificate.pem;\n\
         ssl_certificate_key {directory}/key.pem;\nssl_conf_command Options KTLS;\n{locations}}}\n}}\n"
    );
    let file = stage.directory().join("nginx.conf");
    write(&file, &configuration)?;
    let server = stage
        .server
        .command("nginx")
        .arg("-p")
        .arg(stage.directory());
    let server = server.args(["-e", "stderr", "-c"]).arg(&file);
    stage.serve(End::Server, TLS, server)
}

fn write(file: &Path, text: &str) -> Result<()> {
    std::fs::write(file, text).with_context(|| format!("writing {}", file.display()))
}
