//! A change of policy under open connections: the one it forbids is cut, the other goes on.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use culvert_harness::{Agent, Match, Mesh, Policy, Proc};

use crate::checks::Checks;
use crate::stage::{
    Agents, NAMESPACE, SOON, Stage, WITNESS, connect, converse, hold, principal, text,
};

/// Forbids the direct pair, then the pair between the nodes too. The milliseconds are those of the direct pair, from
/// before the file is written until the client's program has said that its connection was reset.
pub fn revoke(meshed: &Stage, checks: &mut Checks) -> Option<f64> {
    let mut took = None;
    let mut proof = || -> Result<String> {
        let agents = meshed.agents()?;
        let (direct, _) = hold(&meshed.client, &meshed.server_a.pod.at(WITNESS))?;
        let (tunnel, _) = hold(&meshed.client, &meshed.server_b.pod.at(WITNESS))?;
        converse(&direct, "before")?;
        converse(&tunnel, "before")?;

        let (after, how) = forbid(agents, meshed, &["server-a"], &direct)?;
        took = Some(after.as_secs_f64() * 1e3);
        converse(&tunnel, "undisturbed")?;
        ensure!(
            tunnel.events("end").is_empty(),
            "the other connection was cut as well"
        );
        let again = connect(
            &meshed.client,
            &meshed.server_a.pod.at(WITNESS),
            &["--read", "1"],
        )?;
        ensure!(
            text(&again, "connect") != "ok" || text(&again, "read").starts_with("ECONN"),
            "a new connection to server-a was not refused: {again}"
        );

        let (later, far) = forbid(agents, meshed, &["server-a", "server-b"], &tunnel)?;
        Ok(format!(
            "direct: {how} after {:.1} ms, while hbone went on; then hbone: {far} after {:.1} ms",
            after.as_secs_f64() * 1e3,
            later.as_secs_f64() * 1e3
        ))
    };
    let proof = proof();
    checks.add(
        "a policy change cuts what it forbids, and nothing else",
        proof,
    );
    took
}

/// Denies the client these servers and waits for the end of `cut`.
fn forbid(
    agents: &Agents,
    meshed: &Stage,
    servers: &[&str],
    cut: &Proc,
) -> Result<(Duration, String)> {
    let deny = Policy::deny(NAMESPACE, "no-longer").selector();
    let deny = deny.when(Match::principal(&principal("client")));
    let mut mesh = Mesh::clone(&agents.mesh);
    for workload in &mut mesh.workloads {
        if servers.contains(&workload.name.as_str()) {
            *workload = workload.clone().selected_by(&deny);
        }
    }
    mesh.policies.push(deny);
    let file = Agent::default_mesh_file(&meshed.node1);
    let began = Instant::now();
    mesh.write(&file)?;
    let end = cut.wait_for_event("end", SOON)?;
    let after = began.elapsed();
    let how = text(&end, "how").to_owned();
    ensure!(
        how.starts_with("ECONN"),
        "the connection ended with {how}, not with a reset"
    );
    Ok((after, how))
}
