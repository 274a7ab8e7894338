//! Which distribution this is, from os-release(5): setup can install packages where `apt-get` does. Called by `packages`.

use std::fs;

/// Where os-release(5) says to look, in this order.
const FILES: [&str; 2] = ["/etc/os-release", "/usr/lib/os-release"];

#[derive(Debug, PartialEq, Eq)]
pub enum Distribution {
    /// Debian, Ubuntu or one of their children.
    Debian,
    /// Any other, by the name it gives itself.
    Other(String),
}

impl Distribution {
    pub fn detect() -> Self {
        let text = FILES.iter().find_map(|path| fs::read_to_string(path).ok());
        text.map_or_else(
            || Self::Other("a system without /etc/os-release".into()),
            |text| Self::parse(&text),
        )
    }

    fn parse(os_release: &str) -> Self {
        let field = |name: &str| {
            let line = os_release
                .lines()
                .find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='));
            line.map(|value| value.trim_matches(['"', '\'']).to_owned())
        };
        let id = field("ID").unwrap_or_default();
        let like = field("ID_LIKE").unwrap_or_default();
        if std::iter::once(id.as_str())
            .chain(like.split_whitespace())
            .any(|id| matches!(id, "debian" | "ubuntu"))
        {
            return Self::Debian;
        }
        let name = field("PRETTY_NAME")
            .filter(|name| !name.is_empty())
            .unwrap_or(id);
        Self::Other(if name.is_empty() {
            "an unnamed distribution".into()
        } else {
            name
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debian_and_its_children_are_served() {
        for text in [
            "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\n",
            "ID=ubuntu\nID_LIKE=debian",
            "ID=\"linuxmint\"\nID_LIKE=\"ubuntu debian\"",
        ] {
            assert_eq!(Distribution::parse(text), Distribution::Debian, "{text}");
        }
    }

    #[test]
    fn others_are_called_by_their_name() {
        let fedora = "NAME=Fedora\nID=fedora\nPRETTY_NAME=\"Fedora Linux 44\"";
        assert_eq!(
            Distribution::parse(fedora),
            Distribution::Other("Fedora Linux 44".into())
        );
        assert_eq!(
            Distribution::parse("ID=arch"),
            Distribution::Other("arch".into())
        );
    }

    #[test]
    fn version_id_is_not_taken_for_the_id() {
        let text = "VERSION_ID=debian\nBUILD_ID=debian";
        assert_eq!(
            Distribution::parse(text),
            Distribution::Other("an unnamed distribution".into())
        );
        assert_eq!(
            Distribution::parse(""),
            Distribution::Other("an unnamed distribution".into())
        );
    }
}
