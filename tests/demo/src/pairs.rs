//! The pairs of pods, and what a connection of each looks like from both ends: who the server saw, and which way the
//! agents say it took.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::checks::Checks;
use crate::figures::Figures;
use crate::stage::{SOON, Stage, WITNESS, connect, principal, text};

const WORD: &str = "hello";

/// One pair.
#[derive(Clone, Debug, Serialize)]
pub struct Pair {
    pub from: &'static str,
    pub to: &'static str,
    /// The way its connections take, or the place where they were refused.
    pub path: Option<String>,
    pub allowed: bool,
    #[serde(flatten)]
    pub figures: Figures,
    /// The same pods without the mesh.
    pub plain: Figures,
    /// How many times the plain figure; like the others of `ratios`, the median of the rounds' ratios.
    pub ratio_p50: Option<f64>,
    #[serde(skip)]
    pub ratios: Figures,
    /// Who the server's side took the client for.
    #[serde(skip)]
    pub identity: Option<String>,
    /// What the client got, where it may not connect.
    #[serde(skip)]
    pub outcome: Option<String>,
}

/// The four pairs, without figures yet.
pub fn of() -> Vec<Pair> {
    let pair = |from, to, allowed| Pair {
        from,
        to,
        path: None,
        allowed,
        figures: Figures::default(),
        plain: Figures::default(),
        ratio_p50: None,
        ratios: Figures::default(),
        identity: None,
        outcome: None,
    };
    vec![
        pair("client", "server-a", true),
        pair("client", "server-b", true),
        pair("intruder", "server-a", false),
        pair("intruder", "server-b", false),
    ]
}

/// The way to a server that both stages are built for: `client` and `intruder` are on the first node.
pub fn way(to: &str) -> &'static str {
    match to {
        "server-b" => "hbone",
        _ => "direct",
    }
}

/// What both ends saw of one connection.
struct Seen {
    /// The client's own address and port.
    client: SocketAddr,
    /// The one the server was told.
    peer: SocketAddr,
    path: String,
    identity: String,
}

/// Makes a connection of each pair that may, and notes and checks what its ends saw.
pub fn observe(pairs: &mut [Pair], meshed: &Stage, checks: &mut Checks) -> Result<()> {
    meshed.learn(WITNESS)?;
    let mut seen = Vec::new();
    for pair in pairs.iter_mut().filter(|pair| pair.allowed) {
        let look = look(meshed, pair).with_context(|| format!("{} → {}", pair.from, pair.to))?;
        pair.path = Some(look.path.clone());
        pair.identity = Some(look.identity.clone());
        seen.push((pair.to, look));
    }
    let told = |each: &dyn Fn(&str, &Seen) -> Result<String>| -> Result<String> {
        let lines: Result<Vec<_>> = seen.iter().map(|(to, seen)| each(to, seen)).collect();
        Ok(lines?.join(", "))
    };
    let paths = told(&|to, seen| {
        let expected = way(to);
        ensure!(seen.path == expected, "{to}: {}, not {expected}", seen.path);
        Ok(format!("{to} {expected}"))
    });
    checks.add("direct on the node, hbone between the nodes", paths);
    let addresses = told(&|to, seen| {
        ensure!(
            seen.peer == seen.client,
            "{to} saw {}, not {}",
            seen.peer,
            seen.client
        );
        Ok(format!("{to} saw {}", seen.peer))
    });
    checks.add("the servers see the client's own address", addresses);
    let identities = told(&|to, seen| {
        let expected = format!("spiffe://{}", principal("client"));
        ensure!(seen.identity == expected, "{to}: `{}`", seen.identity);
        Ok(format!("{to} saw {expected}"))
    });
    checks.add("the servers' side knows who the client is", identities);
    Ok(())
}

fn look(meshed: &Stage, pair: &Pair) -> Result<Seen> {
    let agents = meshed.agents()?;
    let server = meshed.server(pair.to);
    let far = agents.of(pair.to);
    let (logged, accepted) = (far.log().mark(), server.witness.log().mark());
    let steps = ["--send", WORD, "--half-close", "--read-all"];
    let report = connect(&meshed.client, &server.pod.at(WITNESS), &steps)?;
    ensure!(text(&report, "data") == WORD, "no echo: {report}");
    let local = text(&report, "local").to_owned();
    let accepted = server
        .witness
        .wait_for_event_after(accepted, "accepted", SOON)?;
    let line = far.wait_for_access(logged, &[("src.addr", &local)], SOON)?;
    Ok(Seen {
        client: local.parse()?,
        peer: text(&accepted, "peer").parse()?,
        path: line.field("path").unwrap_or_default(),
        identity: line.field("src.identity").unwrap_or_default(),
    })
}
