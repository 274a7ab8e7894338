//! An archive as the kernel unpacks it into its first file system: cpio, format "newc" (Documentation/driver-api/early-userspace/
//! buffer-format.rst). Written as it is read, nothing kept but the directories there are. Called by `initramfs`.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write},
    path::{Component, Path},
};

use anyhow::{Context as _, bail};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;

pub struct Archive<W> {
    output: W,
    /// Number of the next entry, which stands for its inode: equal numbers would be hard links.
    next: u32,
    directories: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    pub fn new(output: W) -> Self {
        Self {
            output,
            next: 1,
            directories: BTreeSet::new(),
        }
    }

    /// A directory, and those above it. One that is there already is fine.
    pub fn directory(&mut self, path: &Path) -> anyhow::Result<()> {
        let mut name = String::new();
        for part in plain(path)? {
            if !name.is_empty() {
                name.push('/');
            }
            name.push_str(part);
            if self.directories.insert(name.clone()) {
                self.entry(&name, DIRECTORY, &[])?;
            }
        }
        Ok(())
    }

    /// A file that anybody may read and execute.
    pub fn file(&mut self, path: &Path, content: &[u8]) -> anyhow::Result<()> {
        self.leaf(path, PROGRAM, content)
    }

    /// A copy of a file of this machine; a link is followed.
    pub fn copy(&mut self, path: &Path, from: &Path) -> anyhow::Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.file(path, &content)
    }

    pub fn link(&mut self, path: &Path, to: &str) -> anyhow::Result<()> {
        self.leaf(path, LINK, to.as_bytes())
    }

    /// Without this the kernel takes the archive for cut off.
    pub fn finish(mut self) -> anyhow::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.output.flush().context("cannot write the archive")?;
        Ok(self.output)
    }

    fn leaf(&mut self, path: &Path, mode: u32, content: &[u8]) -> anyhow::Result<()> {
        if let Some(parent) = path.parent() {
            self.directory(parent)?;
        }
        self.entry(&plain(path)?.join("/"), mode, content)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> anyhow::Result<()> {
        let size = u32::try_from(content.len())
            .with_context(|| format!("{name}: files of an archive end at 4 GiB"))?;
        let length = u32::try_from(name.len() + 1).context("a name of 4 GiB")?;
        // Inode, mode, user, group, links, time, size, four numbers of devices, length of the name, checksum.
        let fields = [self.next, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, length, 0];
        self.next += 1;
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08X}"));
        }
        header.push_str(name);
        header.push('\0');
        self.padded(header.as_bytes())
            .and_then(|()| self.padded(content))
            .context("cannot write the archive")
    }

    /// Every part is filled up to a multiple of four bytes.
    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.output.write_all(bytes)?;
        let missing = bytes.len().next_multiple_of(4) - bytes.len();
        self.output.write_all([0; 3].split_at(missing).0)
    }
}

/// The parts of a path, absolute or not, that leads nowhere but down.
fn plain(path: &Path) -> anyhow::Result<Vec<&str>> {
    let parts = path.components().filter(|part| *part != Component::RootDir);
    parts
        .map(|part| match part {
            Component::Normal(name) => name
                .to_str()
                .with_context(|| format!("{}: a name that is not UTF-8", path.display())),
            _ => bail!("{}: not a plain path", path.display()),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(fill: impl FnOnce(&mut Archive<Vec<u8>>)) -> String {
        let mut archive = Archive::new(Vec::new());
        fill(&mut archive);
        String::from_utf8(archive.finish().unwrap()).unwrap()
    }

    #[test]
    fn entries_are_as_the_format_wants_them() {
        let text = archive(|archive| archive.file(Path::new("/ab"), b"hello").unwrap());
        let header = "070701\
            00000001000081ED000000000000000000000001\
            000000000000000500000000000000000000000000000000\
            0000000300000000";
        // The name with its end fills up to a multiple of four together with the header, the content by itself.
        assert!(
            text.starts_with(&format!("{header}ab\0\0\0\0hello\0\0\0070701")),
            "{text:?}"
        );
        assert!(text.contains("TRAILER!!!\0"));
        assert_eq!(text.len() % 4, 0);
    }

    #[test]
    fn directories_come_first_and_once() {
        let text = archive(|archive| {
            archive.file(Path::new("/a/b/c"), b"").unwrap();
            archive.link(Path::new("/a/b/d"), "c").unwrap();
        });
        let at = |name: &str| {
            text.match_indices(name)
                .map(|(at, _)| at)
                .collect::<Vec<_>>()
        };
        assert_eq!((at("a/b\0").len(), at("a/b/c\0").len()), (1, 1), "{text:?}");
        assert!(at("a/b\0") < at("a/b/c\0") && at("a/b/c\0") < at("a/b/d\0"));
    }

    #[test]
    fn paths_that_lead_up_are_refused() {
        let mut archive = Archive::new(Vec::new());
        assert!(archive.file(Path::new("/a/../b"), b"").is_err());
        assert!(archive.directory(Path::new("./x")).is_err());
    }
}
