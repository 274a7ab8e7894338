//! What istio-cni makes inside a pod so that its connections come to the agent's ports: chains of iptables in both families, with a rule
//! and a route for the answers. Made with the real programs, in the way that its documentation and its users' dumps show.

use std::time::Duration;

use anyhow::Result;

use crate::pod::Pod;

const STEP: Duration = Duration::from_secs(10);

/// Which of the kernel's two implementations is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    Legacy,
    Nft,
}

impl Backend {
    fn program(self, family: &str, verb: &str) -> String {
        let backend = match self {
            Self::Legacy => "legacy",
            Self::Nft => "nft",
        };
        format!("{family}-{backend}-{verb}")
    }
}

/// What differs between the families.
struct Family {
    iptables: &'static str,
    ip: &'static str,
    loopback: &'static str,
    /// The address that kubelet's probes come from.
    probes: &'static str,
    everything: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family {
        iptables: "iptables",
        ip: "ip",
        loopback: "127.0.0.1/32",
        probes: "169.254.7.127/32",
        everything: "0.0.0.0/0",
    },
    Family {
        iptables: "ip6tables",
        ip: "ip -6",
        loopback: "::1/128",
        probes: "fd16:9254:7127:1337:ffff:ffff:ffff:ffff/128",
        everything: "::/0",
    },
];

/// Programs a pod as istio-cni does, beside what is there.
pub fn program(pod: &Pod, backend: Backend) -> Result<()> {
    for family in FAMILIES {
        let Family { ip, everything, .. } = family;
        let restore = backend.program(family.iptables, "restore");
        let rules = rules(&family);
        shell(
            pod,
            &format!(
                "{restore} --noflush <<'END'\n{rules}END\n{ip} rule add fwmark 0x111/0xfff pref 32764 lookup 100\n{ip} route add local {everything} dev lo table 100"
            ),
        )?;
    }
    Ok(())
}

/// Takes away what [`program`] made, as istio-cni does when a pod leaves the mesh: rule by rule, and it is an error if one is missing.
pub fn unprogram(pod: &Pod, backend: Backend) -> Result<()> {
    for family in FAMILIES {
        let Family { ip, everything, .. } = family;
        let iptables = backend.program(family.iptables, "");
        let iptables = iptables.trim_end_matches('-');
        let mut script = String::new();
        for table in ["mangle", "nat"] {
            for (from, chain) in [("PREROUTING", "ISTIO_PRERT"), ("OUTPUT", "ISTIO_OUTPUT")] {
                for step in [
                    format!("-D {from} -j {chain}"),
                    format!("-F {chain}"),
                    format!("-X {chain}"),
                ] {
                    script += &format!("{iptables} -t {table} {step}\n");
                }
            }
        }
        script += &format!(
            "{ip} rule del fwmark 0x111/0xfff pref 32764 lookup 100\n{ip} route del local {everything} dev lo table 100"
        );
        shell(pod, &script)?;
    }
    Ok(())
}

/// All rules and policy routes that a pod has, in a form that can be compared.
pub fn redirection(pod: &Pod, backend: Backend) -> Result<String> {
    let mut all = String::new();
    for family in FAMILIES {
        let Family { ip, .. } = family;
        let save = backend.program(family.iptables, "save");
        let text = shell(
            pod,
            &format!("{save}; {ip} rule; {ip} route show table 100 2>/dev/null || true"),
        )?;
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        // Chains are counted, and rules are not.
        all.extend(lines.map(|line| match line.split_once(" [") {
            Some((chain, _)) => format!("{chain}\n"),
            None => format!("{line}\n"),
        }));
    }
    Ok(all)
}

/// Runs a script in a pod, to the end.
pub fn shell(pod: &Pod, script: &str) -> Result<String> {
    let script = format!("set -e\n{script}");
    pod.command("sh").args(["-c", &script]).run(STEP)?.success()
}

fn rules(family: &Family) -> String {
    let Family {
        loopback, probes, ..
    } = family;
    // The agent's own sockets carry 0x539; what comes in by one of them is marked with 0x111 by its connection, so that the
    // application's answers find the way back to it.
    format!(
        "*mangle
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A ISTIO_OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
COMMIT
*nat
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -s {probes} -p tcp -m tcp -j ACCEPT
-A ISTIO_PRERT ! -d {loopback} -p tcp -m tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006
-A ISTIO_OUTPUT -d {probes} -p tcp -m tcp -j ACCEPT
-A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
-A ISTIO_OUTPUT ! -d {loopback} -o lo -j ACCEPT
-A ISTIO_OUTPUT ! -d {loopback} -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001
COMMIT
"
    )
}
