//! What `iptables-save` prints, what of it is istio-cni's, and what `iptables-restore` is told to take that away or put it back. No I/O.

use serde::{Deserialize, Serialize};

/// The chains of istio-cni, and the chain of the kernel that leads to each.
const CHAINS: [(&str, &str); 2] = [("ISTIO_PRERT", "PREROUTING"), ("ISTIO_OUTPUT", "OUTPUT")];
/// What the rules in those chains do with a packet. A chain with other targets is somebody else's of that name, such as a sidecar's.
const TARGETS: [&str; 6] = ["ACCEPT", "REDIRECT", "CONNMARK", "MARK", "CT", "RETURN"];
/// More than istio-cni ever makes.
const MOST_RULES: usize = 256;

/// What istio-cni has in one table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// `nat`, `mangle` and so on.
    pub table: String,
    chains: Vec<TakenChain>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct TakenChain {
    name: String,
    /// Where it is entered from, and as which rule there; counted from 1.
    entry: Option<Entry>,
    /// As they are printed.
    rules: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    chain: String,
    position: usize,
}

/// One table as it is printed.
#[derive(Debug, Default)]
struct Printed<'a> {
    name: &'a str,
    chains: Vec<&'a str>,
    /// `-A` and so on.
    rules: Vec<&'a str>,
}

impl Printed<'_> {
    fn has(&self, chain: &str) -> bool {
        self.chains.contains(&chain)
    }

    /// The rules of one chain.
    fn of<'s>(&'s self, chain: &'s str) -> impl Iterator<Item = &'s str> {
        self.rules
            .iter()
            .copied()
            .filter(move |rule| rule.split(' ').nth(1) == Some(chain))
    }
}

/// What of a whole output is istio-cni's.
///
/// # Errors
/// The text of a rule that is not istio-cni's and leads to one of its chains: without the chain it could not be.
pub fn find(output: &str) -> Result<Vec<Taken>, String> {
    let mut found = Vec::new();
    for table in printed(output) {
        let ours: Vec<_> = CHAINS
            .iter()
            .filter(|(chain, _)| table.has(chain) && table.of(chain).all(is_plain))
            .collect();
        for (chain, _) in &ours {
            let foreign = table
                .rules
                .iter()
                .find(|rule| leads_to(rule, chain) && !is_entry(rule));
            if let Some(rule) = foreign {
                return Err((*rule).to_owned());
            }
        }
        let chains: Vec<TakenChain> = ours
            .into_iter()
            .map(|(chain, from)| TakenChain {
                name: (*chain).to_owned(),
                entry: entry(&table, chain, from),
                rules: table.of(chain).map(str::to_owned).collect(),
            })
            .collect();
        let rules: usize = chains.iter().map(|chain| chain.rules.len()).sum();
        if !chains.is_empty() && rules <= MOST_RULES {
            found.push(Taken {
                table: table.name.to_owned(),
                chains,
            });
        }
    }
    Ok(found)
}

fn entry(table: &Printed<'_>, chain: &str, from: &str) -> Option<Entry> {
    let index = table
        .of(from)
        .position(|rule| leads_to(rule, chain) && is_entry(rule))?;
    Some(Entry {
        chain: from.to_owned(),
        position: index + 1,
    })
}

/// Whether a rule is the one that istio-cni enters a chain of its by.
fn is_entry(rule: &str) -> bool {
    CHAINS
        .iter()
        .any(|(chain, from)| rule == format!("-A {from} -j {chain}"))
}

fn leads_to(rule: &str, chain: &str) -> bool {
    let mut words = rule.split(' ');
    words.any(|word| word == "-j" || word == "-g") && words.next() == Some(chain)
}

fn is_plain(rule: &str) -> bool {
    let mut words = rule.split(' ');
    words.any(|word| word == "-j") && words.next().is_some_and(|target| TARGETS.contains(&target))
}

fn printed(output: &str) -> Vec<Printed<'_>> {
    let mut tables: Vec<Printed<'_>> = Vec::new();
    for line in output.lines() {
        if let Some(name) = line.strip_prefix('*') {
            tables.push(Printed {
                name,
                ..Printed::default()
            });
        } else if let Some(table) = tables.last_mut() {
            if let Some(chain) = line.strip_prefix(':') {
                table.chains.extend(chain.split(' ').next());
            } else if line.starts_with("-A ") {
                table.rules.push(line);
            }
        }
    }
    tables
}

/// Takes away what was found, all of it or nothing of each table.
pub fn removal(taken: &[Taken]) -> String {
    script(taken, |table| {
        let entries = table.chains.iter().filter_map(|chain| {
            let from = &chain.entry.as_ref()?.chain;
            Some(format!("-D {from} -j {}", chain.name))
        });
        let flushed = table
            .chains
            .iter()
            .map(|chain| format!("-F {}", chain.name));
        let removed = table
            .chains
            .iter()
            .map(|chain| format!("-X {}", chain.name));
        entries.chain(flushed).chain(removed).collect()
    })
}

/// Puts it back where it was, as far as that is still a place, and nothing of what is there again.
pub fn restoral(taken: &[Taken], output: &str) -> String {
    let now = printed(output);
    script(taken, |table| {
        let now = now.iter().find(|now| now.name == table.table);
        let mut lines = Vec::new();
        for chain in &table.chains {
            if now.is_some_and(|now| now.has(&chain.name)) {
                continue;
            }
            lines.push(format!(":{} - [0:0]", chain.name));
            lines.extend(chain.rules.iter().cloned());
            if let Some(entry) = &chain.entry {
                let others = now.map_or(0, |now| now.of(&entry.chain).count());
                let position = entry.position.min(others + 1);
                let (from, name) = (&entry.chain, &chain.name);
                lines.push(format!("-I {from} {position} -j {name}"));
            }
        }
        lines
    })
}

fn script(taken: &[Taken], lines: impl Fn(&Taken) -> Vec<String>) -> String {
    let mut script = String::new();
    for table in taken {
        let lines = lines(table);
        if !lines.is_empty() {
            script += &format!("*{}\n{}\nCOMMIT\n", table.table, lines.join("\n"));
        }
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "# Generated by iptables-save\n*nat\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [1:60]\n:ISTIO_OUTPUT - [0:0]\n:MINE - [0:0]\n-A OUTPUT -p udp -j MINE\n-A OUTPUT -j ISTIO_OUTPUT\n-A ISTIO_OUTPUT -d 169.254.7.127/32 -p tcp -j ACCEPT\n-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -p tcp -j REDIRECT --to-ports 15001\n-A MINE -j RETURN\nCOMMIT\n*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n";

    #[test]
    fn what_is_istio_cni_s_is_found_and_the_rest_is_not() {
        let found = find(SAVED).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(
            removal(&found),
            "*nat\n-D OUTPUT -j ISTIO_OUTPUT\n-F ISTIO_OUTPUT\n-X ISTIO_OUTPUT\nCOMMIT\n"
        );
        let without: String = SAVED
            .lines()
            .filter(|line| !line.contains("ISTIO"))
            .map(|line| format!("{line}\n"))
            .collect();
        assert_eq!(
            restoral(&found, &without),
            "*nat\n:ISTIO_OUTPUT - [0:0]\n-A ISTIO_OUTPUT -d 169.254.7.127/32 -p tcp -j ACCEPT\n-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -p tcp -j REDIRECT --to-ports 15001\n-I OUTPUT 2 -j ISTIO_OUTPUT\nCOMMIT\n"
        );
        assert_eq!(restoral(&found, SAVED), "", "it is there again");
        assert!(restoral(&found, "").contains("-I OUTPUT 1 -j ISTIO_OUTPUT"));
        assert_eq!(find(&without).unwrap(), []);
    }

    #[test]
    fn a_sidecar_s_chain_of_the_same_name_is_left_alone() {
        let sidecar = "*nat\n:ISTIO_OUTPUT - [0:0]\n:ISTIO_REDIRECT - [0:0]\n-A OUTPUT -p tcp -j ISTIO_OUTPUT\n-A ISTIO_OUTPUT -j ISTIO_REDIRECT\nCOMMIT\n";
        assert_eq!(find(sidecar).unwrap(), []);
    }

    #[test]
    fn a_chain_that_somebody_else_uses_is_not_taken() {
        let rule = "-A MINE -p tcp -j ISTIO_OUTPUT";
        let used = SAVED.replace("-A MINE -j RETURN", rule);
        assert_eq!(find(&used).unwrap_err(), rule);
    }

    #[test]
    fn what_is_no_output_has_nothing() {
        for text in ["", "*", "-A", ":\n-A OUTPUT", "*nat\n:\n-A \n-j -j"] {
            assert_eq!(find(text).unwrap(), [], "{text:?}");
        }
    }
}
