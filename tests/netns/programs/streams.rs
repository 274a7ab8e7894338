//! Streams and connections: iperf3 both ways, stunnel, a server on io_uring, many short connections.

use anyhow::{Context as _, Result};
use culvert_harness::Launch;
use serde_json::Value;

use crate::made;
use crate::stage::{End, Least, Mode, STEP, compare};

const PORT: u16 = 5201;
/// stunnel at the client and at the server.
const NEAR: u16 = 7301;
const TUNNEL: u16 = 7302;
/// Who closes first keeps the pair of ports for a minute: several.
const ONCE: [u16; 4] = [7310, 7311, 7312, 7313];
const RING: u16 = 7320;

pub fn iperf(mode: Mode) -> Result<()> {
    compare(
        mode,
        &[(End::Client, End::Server, PORT)],
        Least {
            direct: 20,
            short: 5,
        },
        |stage, told| {
            let server = stage.server.command("iperf3").args(["-s", "--forceflush"]);
            let _server = stage.serve(End::Server, PORT, server)?;
            let host = stage.server.address().to_string();
            for options in [
                "-n 1G",
                "-n 1G -R",
                "-n 500M -P 4",
                "-n 500M -P 4 -R",
                "-n 300M --bidir",
                "-n 20M -l 100 -N",
                "-n 20M -l 100 -N -R",
                "-n 500M -Z",
                "-n 500M -w 64K",
            ] {
                let client = stage.client.command("iperf3");
                let client = client.args(["-c", &host, "-J"]).args(options.split(' '));
                let report = client.run(STEP)?.success()?;
                let report: Value = serde_json::from_str(&report).context("iperf3's report")?;
                told.say(options, summary(&report));
            }
            Ok(())
        },
    )
}

/// What is the same every time: that all was sent, and that of what was sent nothing was lost on the way.
fn summary(report: &Value) -> String {
    let error = &report["error"];
    let streams = report["end"]["streams"].as_array().map_or(0, Vec::len);
    let bytes = |name: &str| report["end"][name]["bytes"].as_u64().unwrap_or_default();
    let wanted = report["start"]["test_start"]["bytes"]
        .as_u64()
        .unwrap_or_default();
    let (sent, received) = (bytes("sum_sent"), bytes("sum_received"));
    // Both ways at once, it ends when both together have sent so much.
    let both = report["end"]["sum_sent_bidir_reverse"].is_object();
    let all = (both || sent >= wanted) && received <= sent && received > 0;
    format!("{streams} streams, all sent: {all}, error: {error}")
}

pub fn stunnel(mode: Mode) -> Result<()> {
    compare(
        mode,
        &[(End::Client, End::Server, TUNNEL)],
        Least {
            direct: 40,
            // Its connections end soon: now and then one lasts long enough.
            short: 0,
        },
        |stage, told| {
            let directory = stage.directory().display().to_string();
            stage.shell(&format!(
            "cd {directory} && {{ test -f stunnel.pem || {{ openssl req -x509 -newkey ec -pkeyopt \
             ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=server -keyout key.pem -out certificate.pem 2> \
             /dev/null && cat key.pem certificate.pem > stunnel.pem; }}; }}"
        ))?;
            // The same program on both sides: what is within the tunnel stays on each pod's loopback.
            let echo = stage
                .server
                .probe()?
                .args(["serve", "--quiet", "--mode", "collect"]);
            let echo = echo.args(["--port", &PORT.to_string()]);
            let _echo = stage.serve(End::Server, PORT, echo)?;
            let run = |end: End, service: String| -> Result<Launch> {
                let file = stage.directory().join(format!("stunnel-{end:?}"));
                let options = "foreground = yes\npid =\n[one]\n";
                std::fs::write(&file, format!("{options}{service}"))
                    .with_context(|| format!("writing {}", file.display()))?;
                Ok(stage.pod(end).command("stunnel").arg(file))
            };
            let server = format!(
                "accept = {TUNNEL}\nconnect = 127.0.0.1:{PORT}\ncert = {directory}/stunnel.pem\n"
            );
            let _server = stage.serve(End::Server, TUNNEL, run(End::Server, server)?)?;
            let to = stage.server.at(TUNNEL);
            let client = format!("client = yes\naccept = 127.0.0.1:{NEAR}\nconnect = {to}\n");
            let _client = stage.serve(End::Client, NEAR, run(End::Client, client)?)?;
            for (bytes, size, times) in [
                ("1", "1", 20),
                ("1000000", "1000", 15),
                ("100000000", "131072", 5),
            ] {
                for _ in 0..times {
                    let probe = stage.client.probe()?.args(["stream", "--verify", "--to"]);
                    let probe = probe.args([
                        &format!("127.0.0.1:{NEAR}"),
                        "--bytes",
                        bytes,
                        "--size",
                        size,
                    ]);
                    told.say(&format!("{bytes} bytes"), verdict(probe)?);
                }
            }
            Ok(())
        },
    )
}

/// What the probe says of a stream, without the figures.
fn verdict(probe: Launch) -> Result<String> {
    let report = probe.run(STEP)?.json()?;
    let fields = ["ok", "bytes", "count", "errors", "first_error"];
    let told = fields.map(|field| format!("{field} {}", report[field]));
    Ok(told.join(", "))
}

pub fn churn(mode: Mode) -> Result<()> {
    const EACH: u32 = 5000;
    let routes = ONCE.map(|port| (End::Client, End::Server, port));
    let least = Least {
        direct: 4 * EACH,
        short: 0,
    };
    compare(mode, &routes, least, |stage, told| {
        for port in ONCE {
            let server = stage
                .server
                .probe()?
                .args(["serve", "--quiet", "--mode", "once"]);
            let server = server.args(["--acceptors", "8", "--port", &port.to_string()]);
            let _server = stage.serve(End::Server, port, server)?;
            let client = stage
                .client
                .probe()?
                .args(["conn", "--threads", "4", "--count"]);
            told.say(
                "connections",
                verdict(client.args([&EACH.to_string(), "--to", &stage.server.at(port)]))?,
            );
        }
        Ok(())
    })
}

pub fn ring(mode: Mode) -> Result<()> {
    let program = made::go("relay.go")?;
    compare(
        mode,
        &[(End::Client, End::Server, RING)],
        Least {
            direct: 60,
            short: 0,
        },
        |stage, told| {
            let server = stage
                .server
                .probe()?
                .args(["serve-ring", "--port", &RING.to_string()]);
            let _server = stage.serve(End::Server, RING, server)?;
            for (connections, bytes) in [("1", "0"), ("40", "1"), ("20", "5000"), ("4", "20000000")]
            {
                let client =
                    stage
                        .client
                        .command(&program)
                        .args(["ask", "copy", &stage.server.at(RING)]);
                let said = client.args([connections, bytes]).run(STEP)?.success()?;
                told.say(&format!("{bytes} bytes"), said);
            }
            for (size, count) in [("1", "2000"), ("1000", "2000"), ("100000", "100")] {
                let client =
                    stage
                        .client
                        .probe()?
                        .args(["rr", "--connections", "8", "--size", size]);
                let client = client.args(["--count", count, "--to", &stage.server.at(RING)]);
                told.say(&format!("requests of {size}"), verdict(client)?);
            }
            Ok(())
        },
    )
}
