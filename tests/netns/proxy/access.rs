//! Waiting for evidence: lines of the access log, and that a server has told of everything that came to it.

use anyhow::Result;
use culvert_harness::{
    Agent, Pod, Proc,
    agent::AccessLine,
    log::{Line, Mark},
    wait_until,
};
use culvert_tests::scene::{PORT, SOON, answered, connect_to, text};

/// Waits for a connection that failed with `error` in its reason, and has these fields.
pub fn wait_for_failure(
    agent: &Agent,
    from: Mark,
    error: &str,
    fields: &[(&str, &str)],
) -> Result<AccessLine> {
    let pick = |line: &Line| {
        let line = AccessLine::parse(&line.text)?;
        let failed = line.field("error").is_some_and(|text| text.contains(error));
        let fits = fields
            .iter()
            .all(|(key, value)| line.field(key).as_deref() == Some(value));
        (failed && fits).then_some(line)
    };
    agent.log().wait_for(
        from,
        SOON,
        &format!("a failure with `{error}` and {fields:?}"),
        pick,
    )
}

/// Whose connections the server of a pod accepted so far. A connection over the pod's own loopback comes last, and is left
/// out: what came before it has been told by then.
pub fn accepted_from(server: &Proc, pod: &Pod) -> Result<Vec<String>> {
    let report = connect_to(
        pod,
        &format!("127.0.0.1:{PORT}"),
        &["--send", "hello", "--read", "5"],
    )?;
    assert!(answered(&report), "{report}");
    let own = text(&report, "local");
    wait_until(SOON, "the server to tell", || {
        let peers: Vec<_> = server
            .events("accepted")
            .iter()
            .map(|event| text(event, "peer").to_owned())
            .collect();
        Ok(peers.iter().any(|peer| peer == own).then_some(peers))
    })
    .map(|peers| peers.into_iter().filter(|peer| peer != own).collect())
}
