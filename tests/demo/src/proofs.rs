//! What the kernel and the wire say: the two ends of a direct connection, bytes between nodes, and who holds which keys.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use culvert_harness::{Agent, Pod, SocketEntry, TcpState, sockets_of_process};
use serde_json::Value;

use crate::checks::Checks;
use crate::stage::{Stage, WITNESS, connect, converse, hold, principal, text};

const HBONE: u16 = 15008;

/// Adds the proofs that need no figures.
pub fn prove(plain: &Stage, meshed: &Stage, checks: &mut Checks) {
    checks.add(
        "the two applications are each other's peers",
        direct_peers(meshed),
    );
    checks.add(
        "nothing is in clear between the nodes",
        nothing_in_clear(plain, meshed),
    );
    checks.add(
        "agents hold certificates of their own pods only",
        own_certificates(meshed),
    );
}

/// One TCP connection, its two sockets in the hands of the two programs, and none in an agent's.
fn direct_peers(meshed: &Stage) -> Result<String> {
    let agents = meshed.agents()?;
    let server = &meshed.server_a;
    let (held, local) = hold(&meshed.client, &server.pod.at(WITNESS))?;
    converse(&held, "peers")?;
    let find = |pod: &Pod, end: fn(&SocketEntry) -> String| -> Result<SocketEntry> {
        let mut sockets = pod.sockets()?.into_iter();
        let found =
            sockets.find(|socket| socket.state == TcpState::Established && end(socket) == local);
        found.with_context(|| format!("{} has no socket of {local}", pod.name()))
    };
    let near = find(&meshed.client, |socket| socket.local.to_string())?;
    let far = find(&server.pod, |socket| socket.peer.to_string())?;
    ensure!(
        (near.local, near.peer) == (far.peer, far.local),
        "{near:?} and {far:?} are not each other's peers"
    );
    for (program, socket) in [(held.pid(), near), (server.witness.pid(), far)] {
        ensure!(
            sockets_of_process(program)?.contains(&socket.inode),
            "{socket:?} is not the program's, process {program}"
        );
    }
    for agent in [&agents.first, &agents.second] {
        let pid = agent.process().pid();
        let own = sockets_of_process(pid)?;
        // Wherever it may have one: in the pods' namespaces or its own.
        let places = [
            meshed.client.netns(),
            server.pod.netns(),
            agent.node().netns(),
        ];
        for place in places {
            let mut sockets = culvert_harness::socket_table(place)?.into_iter();
            let of_flow = |socket: &SocketEntry| [socket.local, socket.peer].contains(&near.local);
            let held = sockets.find(|socket| of_flow(socket) && own.contains(&socket.inode));
            ensure!(held.is_none(), "the agent, process {pid}, holds {held:?}");
        }
    }
    Ok(format!(
        "{} ↔ {}: inode {} of process {} and inode {} of process {}, none of an agent's",
        near.local,
        near.peer,
        near.inode,
        held.pid(),
        far.inode,
        server.witness.pid()
    ))
}

/// A capture between the nodes finds a word without the mesh, and with the mesh does not.
fn nothing_in_clear(plain: &Stage, meshed: &Stage) -> Result<String> {
    let word = format!("culvert-demo-{}", meshed.fabric.run_id());
    let length = word.len().to_string();
    let say = |stage: &Stage| {
        let capture = stage.fabric.capture()?;
        let to = stage.server_b.pod.at(WITNESS);
        let report = connect(&stage.client, &to, &["--send", &word, "--read", &length])?;
        ensure!(text(&report, "data") == word, "no echo: {report}");
        Ok(capture)
    };
    let control = say(plain)?;
    ensure!(
        control.contains(word.as_bytes())?,
        "the capture misses the word without the mesh: it proves nothing"
    );
    let capture = say(meshed)?;
    if let Some(direction) = capture.find(word.as_bytes())? {
        anyhow::bail!("the word passed in clear: {direction:?}");
    }
    let packets = capture.packets(HBONE)?;
    ensure!(
        packets > 0,
        "nothing passed to port {HBONE}: the capture proves nothing"
    );
    let direct = capture.packets(WITNESS)?;
    ensure!(
        direct == 0,
        "{direct} packets passed to port {WITNESS} itself"
    );
    Ok(format!(
        "the word is found without the mesh, not with it, in {packets} packets of port {HBONE}"
    ))
}

/// Each agent has the identities of the pods on its node, and no other.
fn own_certificates(meshed: &Stage) -> Result<String> {
    let agents = meshed.agents()?;
    let first = held_by(&agents.first, &["client", "intruder", "server-a"])?;
    let second = held_by(&agents.second, &["server-b"])?;
    Ok(format!("node 1: {first}; node 2: {second}"))
}

fn held_by(agent: &Agent, accounts: &[&str]) -> Result<String> {
    let answer = agent.cli(["status", "--json"])?.success()?;
    let status: Value = serde_json::from_str(&answer).context("`culvert status --json`")?;
    let certificates = status.get("certificates").and_then(Value::as_array);
    let certificates = certificates.context("`culvert status --json` names no certificates")?;
    let held: BTreeSet<String> = certificates
        .iter()
        .filter_map(|line| Some(line.as_str()?.split_once(": ")?.0.to_owned()))
        .collect();
    let own = accounts
        .iter()
        .map(|account| format!("spiffe://{}", principal(account)));
    ensure!(
        certificates.len() == accounts.len() && held == own.collect(),
        "the agent of {} holds {certificates:?}, its pods are {accounts:?}",
        agent.node().name()
    );
    Ok(accounts.join(", "))
}
