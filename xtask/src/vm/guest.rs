//! The emulated machine: started, its console read, ended. It never outlives us: not a failure, not a deadline, not a signal.
//! Called by `vm`.

use std::{
    collections::VecDeque,
    io::{BufRead as _, BufReader, Read},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

use super::{
    emulator::{self, Emulator},
    kernel::Image,
};

/// A part of everyday's tests takes 5 to 15 minutes.
const DEADLINE: Duration = Duration::from_secs(40 * 60);
/// A longer line is cut into several.
const LONGEST_LINE: u64 = 1 << 16;
/// How much of the console an error shows.
const TAIL: usize = 40;
const STARTED: &str = "guest: Linux ";
const ENDED: &str = "guest: status ";

/// Boots a guest, hands each line that its test program prints to `line`, and returns the program's exit status.
pub fn run(image: &Image, initramfs: &Path, mut line: impl FnMut(&str)) -> anyhow::Result<i32> {
    let mut machine = Machine::start(image, initramfs)?;
    let deadline = Instant::now() + DEADLINE;
    let mut console = Console::default();
    let ended = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match machine.lines.recv_timeout(left) {
            Ok(text) => {
                if let Some(text) = console.read(&text) {
                    line(&text);
                }
                if let Some(status) = console.status {
                    break Ok(status);
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                break Err(format!(
                    "did not end within {} minutes",
                    DEADLINE.as_secs() / 60
                ));
            }
            Err(RecvTimeoutError::Disconnected) => break Err("ended without saying how".to_owned()),
        }
    };
    // It has said all there is to say: powering off would only take longer.
    machine.end();
    ended.or_else(|how| {
        bail!(
            "the guest with Linux {} {how}; the end of its console:\n{}",
            image.kernel.name(),
            console.tail()
        )
    })
}

/// Ended by its process id when it goes out of scope.
struct Machine {
    child: Child,
    lines: Receiver<String>,
}

impl Machine {
    fn start(image: &Image, initramfs: &Path) -> anyhow::Result<Self> {
        // setpriv becomes qemu, and has the kernel end it when the thread that started it ends, however that happens.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        let emulator = Emulator::find().context("there is no emulator although it was there")?;
        let mut command = emulator.through(command);
        // Emulated, so that it is the same everywhere: where this machine is itself a guest there is no KVM. Its processors take turns:
        // side by side, one may go on running code that another one has just written over, and its kernel, which writes
        // into itself whenever a tracepoint is switched, dies of that now and then ("Oops: int3").
        command.args([
            "-accel",
            "tcg,thread=single",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            "2G",
        ]);
        command.args([
            "-nodefaults",
            "-nographic",
            "-no-reboot",
            "-serial",
            "stdio",
        ]);
        command.arg("-kernel").arg(image.kernel_file());
        command.arg("-initrd").arg(initramfs);
        command.args(["-append", "console=ttyS0 quiet loglevel=3 panic=-1"]);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| format!("cannot start {} through setpriv", emulator::PROGRAM))?;
        let output = child.stdout.take().context("qemu has no output to read")?;
        let (sender, lines) = mpsc::sync_channel(256);
        thread::spawn(move || pass_on(output, &sender));
        Ok(Self { child, lines })
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

/// Ends with the output, or when nobody listens any more.
fn pass_on(output: ChildStdout, lines: &SyncSender<String>) {
    let mut output = BufReader::new(output);
    let mut line = Vec::new();
    loop {
        line.clear();
        match output
            .by_ref()
            .take(LONGEST_LINE)
            .read_until(b'\n', &mut line)
        {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if lines
            .send(String::from_utf8_lossy(&line).into_owned())
            .is_err()
        {
            return;
        }
    }
}

/// What the console has shown.
#[derive(Debug, Default)]
struct Console {
    last: VecDeque<String>,
    started: bool,
    status: Option<i32>,
}

impl Console {
    /// Reads a line; gives it back if the test program printed it.
    fn read(&mut self, line: &str) -> Option<String> {
        // The firmware moves the cursor about, and a console ends lines with a carriage return.
        let line: String = line
            .chars()
            .filter(|letter| *letter == '\t' || !letter.is_control())
            .collect();
        if self.last.len() == TAIL {
            self.last.pop_front();
        }
        self.last.push_back(line.clone());
        // Behind the firmware's last words, or behind what a program left without an end of line.
        if let Some((before, status)) = line.split_once(ENDED) {
            self.status = status.trim().parse().ok();
            return (self.started && !before.is_empty()).then(|| before.to_owned());
        }
        if !self.started {
            self.started = line.contains(STARTED);
            return None;
        }
        Some(line)
    }

    fn tail(&self) -> String {
        let lines: Vec<&str> = self.last.iter().map(String::as_str).collect();
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> (Vec<String>, Console) {
        let mut console = Console::default();
        let passed = lines.iter().filter_map(|line| console.read(line)).collect();
        (passed, console)
    }

    #[test]
    fn only_what_the_tests_print_is_passed_on() {
        let (passed, console) = read(&[
            "SeaBIOS\r\n",
            "\x1b[2Jguest: Linux 6.1.0\r\n",
            "running 1 test\r\n",
            "\r\n",
            "half a lineguest: status 101\r\n",
        ]);
        assert_eq!(passed, ["running 1 test", "", "half a line"]);
        assert_eq!(console.status, Some(101));
    }

    #[test]
    fn guest_that_fails_before_the_tests_has_a_status_too() {
        let (passed, console) = read(&[
            "guest: this kernel has no bpffs\r\n",
            "guest: status 125\r\n",
        ]);
        assert!(passed.is_empty());
        assert_eq!(console.status, Some(125));
        assert!(console.tail().contains("no bpffs"));
    }

    #[test]
    fn console_keeps_its_last_lines_only() {
        let many: Vec<String> = (0..1000).map(|number| format!("line {number}")).collect();
        let (_, console) = read(&many.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(console.last.len(), TAIL);
        assert!(console.tail().ends_with("line 999") && console.status.is_none());
    }
}
