//! What was found: the document `--json` prints, and whether every check holds.

use anyhow::{Context, Result};
use serde::Serialize;

use crate::checks::Check;
use crate::pairs::Pair;

/// The whole of it. Field names are an interface: scripts read them.
#[derive(Debug, Serialize)]
pub struct Report {
    pub pairs: Vec<Pair>,
    /// From the writing of the policy to the end the client saw; `None` if it saw none.
    pub revocation_ms: Option<f64>,
    pub checks: Vec<Check>,
}

impl Report {
    /// One JSON document.
    pub fn json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).context("writing the report as JSON")
    }

    /// Whether every check holds.
    pub fn holds(&self) -> bool {
        !self.checks.is_empty() && self.checks.iter().all(|check| check.ok)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_has_the_promised_fields() {
        let report = Report {
            pairs: crate::pairs::of(),
            revocation_ms: None,
            checks: Vec::new(),
        };
        let document: serde_json::Value = serde_json::from_str(&report.json().unwrap()).unwrap();
        let names = |at: &str| -> Vec<String> {
            let object = document.pointer(at).and_then(|value| value.as_object());
            let mut names: Vec<_> = object.unwrap().keys().cloned().collect();
            names.sort();
            names
        };
        assert_eq!(names(""), ["checks", "pairs", "revocation_ms"]);
        let pair = [
            "allowed",
            "from",
            "gbit_s",
            "p50_us",
            "p99_us",
            "path",
            "plain",
            "ratio_p50",
            "rps",
            "to",
        ];
        assert_eq!(names("/pairs/0"), pair);
        assert_eq!(
            names("/pairs/0/plain"),
            ["gbit_s", "p50_us", "p99_us", "rps"]
        );
        assert!(!report.holds(), "no check is no proof");
    }
}
