//! The admin socket: who is answered, what is refused, and that nonsense harms nobody.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
};

use anyhow::Result;
use culvert_harness::{Agent, culvert_binary, wait_until};
use culvert_tests::scene::{SOON, Scene, answered, echo, serve, status};
use serde_json::Value;

fn open_to_all(path: &Path, mode: u32) -> Result<()> {
    Ok(std::fs::set_permissions(
        path,
        std::fs::Permissions::from_mode(mode),
    )?)
}

/// Asks as nobody and tells whether the agent answered.
fn nobody_is_answered(knobs: &'static str) -> Result<bool> {
    let scene = Scene::without(knobs)?;
    // Everything but the check of the peer's credentials is opened.
    for directory in [scene.fabric.directory(), scene.node1.directory()] {
        open_to_all(directory, 0o755)?;
    }
    open_to_all(scene.agent1.admin_socket(), 0o666)?;
    let program = scene.node1.directory().join("culvert");
    // By another process: a program that a thread beside this one starts meanwhile would hold the copy open for writing.
    let copied = std::process::Command::new("cp")
        .arg(culvert_binary()?)
        .arg(&program)
        .status()?;
    assert!(copied.success(), "cp: {copied}");
    open_to_all(&program, 0o755)?;
    let list = |user: &str| {
        let setpriv = scene.node1.command("/usr/bin/setpriv").args([
            "--reuid",
            user,
            "--regid",
            user,
            "--clear-groups",
        ]);
        setpriv
            .arg(&program)
            .args(["pod", "list", "--admin-socket"])
            .arg(scene.agent1.admin_socket())
            .run(SOON)
    };
    assert!(list("0")?.success()?.contains("n1-client"));
    let answer = list("65534")?;
    if !answer.status.success() {
        assert!(answer.stderr.contains("root"), "{answer:?}");
    }
    assert_eq!(
        answer.stdout.contains("n1-client"),
        answer.status.success(),
        "{answer:?}"
    );
    Ok(answer.status.success())
}

#[test]
fn only_root_is_answered() -> Result<()> {
    assert!(!nobody_is_answered("")?);
    Ok(())
}

#[test]
fn twin_anybody_is_answered_when_credentials_are_not_checked() -> Result<()> {
    assert!(nobody_is_answered("skip-peer-credentials")?);
    Ok(())
}

#[test]
fn what_is_logged_is_changed_while_the_agent_runs() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(scene.server_b()?, "echo")?;
    let agent = &scene.agent1;
    let logs = |begins: &str| -> Result<()> {
        let mark = agent.log().mark();
        assert!(answered(&echo(&scene.client, scene.server_b()?)?));
        agent.wait_for_access(mark, &[("direction", "outbound")], SOON)?;
        let levels = agent.set_logging("")?;
        assert!(levels.body.starts_with(begins), "{levels:?}");
        Ok(())
    };
    logs("current log level is info")?;
    assert_eq!(agent.set_logging("level=loud")?.status, 400);
    logs("current log level is info")?;
    assert_eq!(agent.set_logging("level=access:off,debug")?.status, 200);
    let before = agent.access_log().len();
    let mark = agent.log().mark();
    let closed = || agent.metric("istio_tcp_connections_closed_total", &[]);
    let closed_before = closed()?;
    assert!(answered(&echo(&scene.client, scene.server_b()?)?));
    // Its line would be written now.
    wait_until(SOON, "the connection to be counted", || {
        Ok((closed()? > closed_before).then_some(()))
    })?;
    assert_eq!(agent.set_logging("reset")?.status, 200);
    assert!(answered(&echo(&scene.client, scene.server_b()?)?));
    agent.wait_for_access(mark, &[("direction", "outbound")], SOON)?;
    assert_eq!(agent.access_log().len(), before + 1);
    logs("current log level is info")
}

fn say(agent: &Agent, line: &[u8]) -> Result<String> {
    let mut stream = UnixStream::connect(agent.admin_socket())?;
    stream.set_read_timeout(Some(SOON))?;
    // A refusal may come before everything was sent.
    let _ = stream.write_all(line);
    let mut answer = String::new();
    let _ = BufReader::new(stream).read_line(&mut answer);
    Ok(answer)
}

#[test]
fn nonsense_is_refused_and_harms_nobody() -> Result<()> {
    let scene = Scene::new()?;
    // Clients that say nothing, or half of something, hold nobody up.
    let mut idle = Vec::new();
    for _ in 0..20 {
        let mut stream = UnixStream::connect(scene.agent1.admin_socket())?;
        stream.write_all(b"{\"pod_")?;
        idle.push(stream);
    }
    let long = [b"{\"pod_list\":\"".as_slice(), &[b'x'; 1 << 20], b"\"}\n"].concat();
    let deep = [[b'['; 40_000].as_slice(), b"\n"].concat();
    let lines: [&[u8]; 11] = [
        b"\n",
        b"nonsense\n",
        b"{}\n",
        b"[]\n",
        b"null\n",
        b"{\"unload\":{}}\n",
        b"{\"pod_add\":{\"netns\":\"/run/netns/x\"}}\n",
        b"{\"pod_add\":{\"netns\":\"/run/netns/x\",\"uid\":\"a\",\"extra\":1}}\n",
        b"{\"status\":{}\xff}\n",
        &deep,
        &long,
    ];
    for line in lines {
        let answer = say(&scene.agent1, line)?;
        let shown = String::from_utf8_lossy(line.get(..60).unwrap_or(line)).into_owned();
        let reply: Value = serde_json::from_str(&answer).unwrap_or_default();
        assert_eq!(reply["error"]["kind"], "bad_request", "{shown}: {answer}");
    }
    assert_eq!(status(&scene.agent1)?["pods"], 3);
    Ok(())
}

#[test]
fn what_is_no_pod_is_not_enrolled() -> Result<()> {
    let scene = Scene::new()?;
    let spare = scene.node1.pod("spare")?;
    let directory = scene.fabric.directory();
    let file = directory.join("regular");
    std::fs::write(&file, "")?;
    let fifo = directory.join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU)?;
    let spare_netns = spare.netns().path().display().to_string();
    let path = |path: &Path| path.display().to_string();
    let own_netns = path(scene.node1.netns().path());
    let cases: [(&str, &str, &str, &str, &str); 15] = [
        (&spare_netns, "n1-spare", "demo", "bad account", "printable"),
        (
            &spare_netns,
            "n1-spare",
            "demo",
            "sp/are",
            "service account",
        ),
        (&spare_netns, "n1-spare", "DE/MO", "spare", "namespace"),
        (&spare_netns, "", "demo", "spare", "uid"),
        (&spare_netns, "with space", "demo", "spare", "uid"),
        (
            "/run/netns/none-of-these",
            "n1-spare",
            "demo",
            "spare",
            "none-of-these",
        ),
        (&path(&file), "n1-spare", "demo", "spare", "regular"),
        (
            &path(directory),
            "n1-spare",
            "demo",
            "spare",
            "network namespace",
        ),
        (&path(&fifo), "n1-spare", "demo", "spare", "fifo"),
        (
            "/proc/1/ns/mnt",
            "n1-spare",
            "demo",
            "spare",
            "network namespace",
        ),
        ("/dev/zero", "n1-spare", "demo", "spare", "zero"),
        (&own_netns, "n1-spare", "demo", "spare", "agent's own"),
        (
            &spare_netns,
            "n1-client",
            "demo",
            "client",
            "another network namespace",
        ),
        (
            &path(scene.client.netns().path()),
            "n1-spare",
            "demo",
            "spare",
            "enrolled already",
        ),
        (
            &spare_netns,
            "n1-server-a",
            "demo",
            "client",
            "the mesh says",
        ),
    ];
    for (netns, uid, namespace, account, complaint) in &cases {
        let add = [
            "pod",
            "add",
            "--netns",
            netns,
            "--uid",
            uid,
            "--namespace",
            namespace,
            "--service-account",
            account,
        ];
        let refused = scene.agent1.cli(add)?;
        assert!(
            !refused.status.success(),
            "{netns} {uid} {account}: {refused:?}"
        );
        assert!(
            refused.stderr.contains(complaint),
            "{netns} {uid} {account}: {}",
            refused.stderr
        );
    }
    let pods: Value =
        serde_json::from_str(&scene.agent1.cli(["pod", "list", "--json"])?.success()?)?;
    assert_eq!(pods.as_array().map(Vec::len), Some(3), "{pods}");
    // The same pod again changes nothing, and the spare one can still be enrolled.
    scene
        .agent1
        .enrol_as(&scene.client, scene.workload(&scene.client)?)?;
    scene
        .agent1
        .enrol(&spare, "n1-spare", "demo", "spare", "spare")?;
    assert!(
        !scene
            .agent1
            .cli(["pod", "remove", "n1-nobody"])?
            .status
            .success()
    );
    Ok(())
}

#[test]
fn flows_are_told_as_they_end() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(scene.server_b()?, "echo")?;
    let program = scene.node1.command(culvert_binary()?);
    let follower = program
        .args(["flows", "--json", "--admin-socket"])
        .arg(scene.agent1.admin_socket())
        .spawn()?;
    for _ in 0..2 {
        assert!(answered(&echo(&scene.client, scene.server_b()?)?));
    }
    let line = follower.wait_for_line("server-b", SOON)?;
    let flow: Value = serde_json::from_str(&line)?;
    assert!(
        flow.to_string().contains("hbone") && flow.to_string().contains("client"),
        "{flow}"
    );
    Ok(())
}
