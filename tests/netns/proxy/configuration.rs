//! `culvert node` and what it is told.

use anyhow::Result;
use culvert_harness::{Fabric, Finished, Node, culvert_binary};
use culvert_tests::scene::SOON;

fn node_with(
    node: &Node,
    file: &str,
    arguments: &[&str],
    env: &[(&str, &str)],
) -> Result<Finished> {
    let path = node.directory().join("config.yaml");
    std::fs::write(&path, file)?;
    let launch = node
        .agent_command(culvert_binary()?)
        .arg("node")
        .arg("--config")
        .arg(&path);
    launch.args(arguments).envs(env.iter().copied()).run(SOON)
}

#[test]
fn all_errors_of_a_configuration_are_told_at_once() -> Result<()> {
    let fabric = Fabric::new()?;
    let file = "nodeNme: a\nthreads: 0\nunheard: 1\n";
    let refused = node_with(
        &fabric.node()?,
        file,
        &["--log-format", "xml"],
        &[("SECRET_TTL", "soon")],
    )?;
    assert_eq!(refused.status.code(), Some(78), "{refused:?}");
    for wrong in [
        "nodeNme",
        "nodeName",
        "threads",
        "unheard",
        "xml",
        "SECRET_TTL",
    ] {
        assert!(
            refused.stderr.contains(wrong),
            "{wrong} is not told:\n{}",
            refused.stderr
        );
    }
    Ok(())
}

#[test]
fn a_printed_configuration_can_be_read_again() -> Result<()> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let env = [
        ("NODE_NAME", "a"),
        ("SECRET_TTL", "90m"),
        ("CULVERT_THREADS", "3"),
    ];
    let first = node_with(&node, "", &["--print-config"], &env)?.success()?;
    assert!(
        first.contains("5400s") && first.contains("threads: 3"),
        "{first}"
    );
    let again = node_with(&node, &first, &["--print-config"], &[])?.success()?;
    assert_eq!(first, again);
    Ok(())
}

#[test]
fn a_protection_that_does_not_exist_cannot_be_switched_off() -> Result<()> {
    let fabric = Fabric::new()?;
    let refused = node_with(
        &fabric.node()?,
        "",
        &[],
        &[
            ("CULVERT_TEST_KNOBS", "skip-everything"),
            ("NODE_NAME", "a"),
        ],
    )?;
    assert!(!refused.status.success());
    assert!(
        refused.stderr.contains("skip-everything") || refused.stdout.contains("skip-everything"),
        "{refused:?}"
    );
    Ok(())
}
