//! A wall clock that a test sets, for programs that are started under it: Debian's libfaketime, which answers before the C library.
//! Monotonic clocks go on as they are, as when an operator or a time server steps the machine's clock.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::mesh::replace_file;
use crate::process::Proc;

const SHARED_MEMORY: &str = "/dev/shm";

/// The clock. It goes as the machine's does until it is set.
#[derive(Debug)]
pub struct Clock {
    file: PathBuf,
    library: PathBuf,
}

impl Clock {
    /// One that is set by a file in this directory.
    pub fn in_directory(directory: &Path) -> Result<Self> {
        let architecture = std::env::consts::ARCH;
        let library = format!("/usr/lib/{architecture}-linux-gnu/faketime/libfaketimeMT.so.1");
        let clock = Self {
            file: directory.join("clock"),
            library: library.into(),
        };
        ensure!(
            clock.library.is_file(),
            "{} is not there: install Debian's package libfaketime",
            clock.library.display()
        );
        clock.set_ahead(Duration::ZERO)?;
        Ok(clock)
    }

    /// What a program is started with to go by it.
    pub fn environment(&self) -> Vec<(String, String)> {
        let variables = [
            ("LD_PRELOAD", self.library.display().to_string()),
            ("FAKETIME_TIMESTAMP_FILE", self.file.display().to_string()),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ];
        variables
            .map(|(name, value)| (name.to_owned(), value))
            .into()
    }

    /// Sets it ahead of the machine's by this much, at once.
    pub fn set_ahead(&self, by: Duration) -> Result<()> {
        replace_file(&self.file, &format!("+{}\n", by.as_secs()))
    }

    /// Takes the names away that a program under it has given to what it shares, and leaves there when it is killed.
    pub fn tidy(&self, process: &Proc) -> Result<()> {
        for name in ["faketime_shm_", "sem.faketime_sem_"] {
            let path = Path::new(SHARED_MEMORY).join(format!("{name}{}", process.pid()));
            std::fs::remove_file(path)?;
        }
        Ok(())
    }
}
