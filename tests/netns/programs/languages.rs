//! Programs in Go, Java and Python that talk by the means of their languages: io.Copy, which splices; blocking sockets and
//! threads; asyncio.

use anyhow::Result;
use culvert_harness::Launch;

use crate::made;
use crate::stage::{End, Least, Mode, STEP, compare, python};

const PORT: u16 = 7200;
const RELAY: u16 = 7201;

/// Between two connections, io.Copy splices.
pub fn go_splicing(mode: Mode) -> Result<()> {
    go(mode, "splice", 0)
}

pub fn go_copying(mode: Mode) -> Result<()> {
    go(mode, "copy", 10)
}

fn go(mode: Mode, how: &str, short: u64) -> Result<()> {
    let program = made::go("relay.go")?;
    let routes = [
        (End::Client, End::Server, PORT),
        (End::Client, End::Relay, RELAY),
        (End::Relay, End::Server, PORT),
    ];
    let least = Least { direct: 150, short };
    compare(mode, &routes, least, |stage, told| {
        let run = |end| stage.pod(end).command(&program);
        let own = |port| format!("0.0.0.0:{port}");
        let server = run(End::Server).args(["echo", how, &own(PORT)]);
        let _server = stage.serve(End::Server, PORT, server)?;
        let relay = run(End::Relay).args(["pass", how, &own(RELAY), &stage.server.at(PORT)]);
        let _relay = stage.serve(End::Relay, RELAY, relay)?;
        for (case, to) in [
            ("echo", stage.server.at(PORT)),
            ("relay", stage.pod(End::Relay).at(RELAY)),
        ] {
            for (connections, bytes) in [("1", "0"), ("40", "1"), ("20", "5000"), ("4", "20000000")]
            {
                let client = run(End::Client).args(["ask", how, &to, connections, bytes]);
                told.say(
                    &format!("{case} by {how}, {bytes} bytes"),
                    client.run(STEP)?.success()?,
                );
            }
        }
        Ok(())
    })
}

pub fn java(mode: Mode) -> Result<()> {
    let classes = made::java("Threads.java")?;
    compare(
        mode,
        &[(End::Client, End::Server, PORT)],
        Least {
            direct: 16,
            short: 0,
        },
        |stage, told| {
            let run = |end| {
                let java = stage.pod(end).command("java");
                let java = java.args(["-XX:+UseSerialGC", "-Xshare:auto", "-cp"]);
                java.arg(&classes).arg("Threads")
            };
            let server = run(End::Server).args(["serve", &PORT.to_string()]);
            let _server = stage.serve(End::Server, PORT, server)?;
            let host = stage.server.address().to_string();
            let client = run(End::Client).args(["ask", &host, &PORT.to_string(), "16", "300"]);
            told.say("threads", client.run(STEP)?.success()?);
            Ok(())
        },
    )
}

pub fn asyncio(mode: Mode) -> Result<()> {
    talk(mode, "tasks", "tasks", 16)
}

pub fn threads(mode: Mode) -> Result<()> {
    talk(mode, "threads", "threads", 0)
}

pub fn mixed(mode: Mode) -> Result<()> {
    talk(mode, "tasks", "threads", 0)
}

fn talk(mode: Mode, serving: &str, asking: &str, short: u64) -> Result<()> {
    compare(
        mode,
        &[(End::Client, End::Server, PORT)],
        Least { direct: 32, short },
        |stage, told| {
            let script = |end, way: &str| -> Launch {
                python(stage.pod(end)).arg(made::source("talk.py")).arg(way)
            };
            let port = PORT.to_string();
            let server = script(End::Server, serving).args(["serve", &port]);
            let _server = stage.serve(End::Server, PORT, server)?;
            let host = stage.server.address().to_string();
            let client = script(End::Client, asking).args(["ask", &host, &port, "32", "100"]);
            told.say(asking, client.run(STEP)?.success()?);
            Ok(())
        },
    )
}
