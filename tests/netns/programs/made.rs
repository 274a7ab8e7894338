//! What is made once and kept below `target`: the large file, programs compiled from `tests/programs`. Called by the modules
//! here, from several threads and, now and then, several processes.

use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};

const DIRECTORY: &str = env!("CARGO_TARGET_TMPDIR");
pub const LARGE: usize = 200 << 20;

/// The source of a program that these tests run.
pub fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("programs")
        .join(name)
}

/// 200 MB of which no part is like another.
pub fn large_file() -> Result<PathBuf> {
    made("large", &LARGE.to_string(), |path| {
        let mut file = BufWriter::new(File::create(path)?);
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..LARGE / 8 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            file.write_all(&state.to_le_bytes())?;
        }
        Ok(file.flush()?)
    })
}

/// A program in Go.
pub fn go(name: &str) -> Result<PathBuf> {
    let source = source(name);
    made(name, &std::fs::read_to_string(&source)?, |path| {
        let mut go = Command::new("go");
        go.args(["build", "-o"]).arg(path).arg(&source);
        go.env("GOCACHE", Path::new(DIRECTORY).join("go-cache"));
        compile(go.env("CGO_ENABLED", "0").env("GO111MODULE", "off"))
    })
}

/// A directory with the classes of a program in Java.
pub fn java(name: &str) -> Result<PathBuf> {
    let source = source(name);
    made(name, &std::fs::read_to_string(&source)?, |path| {
        compile(Command::new("javac").arg("-d").arg(path).arg(&source))
    })
}

fn compile(compiler: &mut Command) -> Result<()> {
    let output = compiler.stdin(Stdio::null()).output().with_context(|| {
        format!(
            "starting {:?}: `cargo xtask test` installs what is needed",
            compiler.get_program()
        )
    })?;
    ensure!(
        output.status.success(),
        "{:?}: {}",
        compiler.get_program(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Makes a file or directory if there is none made of the same `content`. It appears under its name when it is complete.
fn made(name: &str, content: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    let stem = format!("program-{name}-{:016x}", hasher.finish());
    let path = Path::new(DIRECTORY).join(&stem);
    if path.exists() {
        return Ok(path);
    }
    let unfinished = Path::new(DIRECTORY).join(format!("{stem}.{}", std::process::id()));
    make(&unfinished).with_context(|| format!("making {}", unfinished.display()))?;
    match std::fs::rename(&unfinished, &path) {
        // Another process was faster.
        Err(_) if path.exists() => {}
        outcome => outcome.with_context(|| format!("making {}", path.display()))?,
    }
    Ok(path)
}
