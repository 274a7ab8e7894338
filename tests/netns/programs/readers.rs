//! Every way to read: `readers.py` at both ends, each system call's result compared.

use anyhow::Result;

use crate::made::source;
use crate::stage::{End, Least, Mode, STEP, compare_without, python};

const PORT: u16 = 7100;

/// Each case with both ends as readers, on a new flow and one in use.
pub fn reading(mode: Mode) -> Result<()> {
    let least = Least {
        direct: 250,
        short: 100,
    };
    check(mode, None, least)
}

/// Who splices may be treated otherwise from then on: apart from the other cases.
pub fn splicing(mode: Mode) -> Result<()> {
    let least = Least {
        direct: 30,
        short: 0,
    };
    check(mode, Some("splice"), least)
}

fn check(mode: Mode, which: Option<&str>, least: Least) -> Result<()> {
    // What differs is to be seen: with it, no flow of a pod that uses FIONREAD or splice(2) once is short-circuited.
    compare_without(
        "skip-readers",
        mode,
        &[(End::Client, End::Server, PORT)],
        least,
        |stage, told| {
            let control = stage.directory().join("control");
            // That of the run before this one.
            let _ = std::fs::remove_file(&control);
            let script = |pod| python(pod).arg(source("readers.py"));
            let server = script(&stage.server).arg("serve").arg(&control).spawn()?;
            server.wait_for_line("listening", STEP)?;
            let (host, port) = (stage.server.address().to_string(), PORT.to_string());
            let driver = script(&stage.client).arg("drive").arg(&control);
            let short = stage.is_short().then_some("short");
            let driver = driver.args([host, port]).args(which).args(short);
            let said = driver.run(4 * STEP)?.success()?;
            for line in said.lines() {
                let (case, line) = line.split_once('\t').unwrap_or(("readers", line));
                told.say(case, line);
            }
            Ok(())
        },
    )
}
