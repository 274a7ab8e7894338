//! Every way to read: `readers.py` at both ends, each system call's result compared.

use anyhow::Result;

use crate::made::source;
use crate::stage::{End, Mode, STEP, compare, python};

const PORT: u16 = 7100;
/// Each case with both ends as readers, on a new flow and one in use.
const CONNECTIONS: u32 = 100;

pub fn check(mode: Mode) -> Result<()> {
    compare(
        mode,
        &[(End::Client, End::Server, PORT)],
        CONNECTIONS,
        |stage, told| {
            let control = stage.directory().join("control");
            // That of the run before this one.
            let _ = std::fs::remove_file(&control);
            let script = |pod| python(pod).arg(source("readers.py"));
            let server = script(&stage.server).arg("serve").arg(&control).spawn()?;
            server.wait_for_line("listening", STEP)?;
            let (host, port) = (stage.server.address().to_string(), PORT.to_string());
            let driver = script(&stage.client).arg("drive").arg(&control);
            let said = driver.args([host, port]).run(2 * STEP)?.success()?;
            for line in said.lines() {
                let (case, line) = line.split_once('\t').unwrap_or(("readers", line));
                told.say(case, line);
            }
            Ok(())
        },
    )
}
