//! Random sequences of socket calls over short-circuited flows, compared call by call with the same over plain TCP.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use culvert_harness::{Fabric, Pod, stretch};
use culvert_tests::scene::{PORT, Scene};
use serde_json::Value;

const A_WHILE: Duration = Duration::from_secs(300);
/// On this machine; under emulation a twentieth.
const COUNT: u32 = 10_000;
/// Programs that run a part of them each, at ports of their own.
const AT_ONCE: u16 = 4;

/// What came of each call of one sequence.
type Said = Vec<String>;

/// What each sequence said. An error where bytes were not what the other end had sent.
fn run(client: &Pod, server: &Pod, count: u32) -> Result<Vec<Said>> {
    let each = count / u32::from(AT_ONCE);
    // Most of the time is spent waiting.
    let parts: Vec<Result<Vec<Said>>> = thread::scope(|scope| {
        let begun: Vec<_> = (0..AT_ONCE)
            .map(|part| scope.spawn(move || run_part(client, server, part, each)))
            .collect();
        let ended = begun.into_iter().map(|part| part.join().unwrap());
        ended.collect()
    });
    Ok(parts.into_iter().collect::<Result<Vec<_>>>()?.concat())
}

fn run_part(client: &Pod, server: &Pod, part: u16, count: u32) -> Result<Vec<Said>> {
    let launch = client
        .probe()?
        .args(["sequences", "--to", &server.at(PORT + part), "--netns"])
        .arg(server.netns().path())
        .args(["--first", &(u32::from(part) * count).to_string()])
        .args(["--count", &count.to_string()]);
    let text = launch.run(A_WHILE)?.success()?;
    let said = text.lines().filter_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        let said = line.get("said")?.as_array()?.iter();
        Some(said.filter_map(Value::as_str).map(str::to_owned).collect())
    });
    let said: Vec<_> = said.collect();
    ensure!(said.len() == count as usize, "{} of {count}", said.len());
    Ok(said)
}

fn plain(count: u32) -> Result<Vec<Said>> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    run(&node.pod("client")?, &node.pod("server-a")?, count)
}

fn count() -> u32 {
    if stretch(Duration::from_secs(1)) > Duration::from_secs(1) {
        COUNT / 20
    } else {
        COUNT
    }
}

/// Whether an end was closed with something unread: the other end is known not to be told of it. Or aborted: how much of what it had
/// sent arrives is left to chance, over plain TCP as well.
fn is_cut_off(said: &[String]) -> bool {
    let closes = |what: &String| what.contains(" closes with ") && !what.ends_with(" 0 unread");
    said.iter()
        .any(|what| closes(what) || what.contains(" aborts with "))
}

/// How many sequences were told otherwise of an end that is known to differ; an error for any other difference.
fn compare(plain: &[Said], short: &[Said]) -> Result<usize> {
    let mut known = 0;
    for (number, (plain, short)) in plain.iter().zip(short).enumerate() {
        let both = plain.iter().zip(short);
        let Some(at) = both.clone().position(|(plain, short)| plain != short) else {
            ensure!(plain.len() == short.len(), "sequence {number}");
            continue;
        };
        let (before, said) = (short.get(..at), short.get(at));
        ensure!(
            before.is_some_and(is_cut_off),
            "sequence {number}: {:?} over plain TCP, {said:?} here, after {before:?}",
            plain.get(at)
        );
        known += 1;
    }
    Ok(known)
}

#[test]
fn every_call_says_what_it_says_over_plain_tcp() -> Result<()> {
    let count = count();
    let plain = plain(count)?;
    let scene = Scene::short("eager-short-circuit")?;
    let short = run(&scene.client, &scene.server_a, count)?;
    let entered = scene.short_circuited()?;
    ensure!(entered > f64::from(count) / 20.0, "{entered} of {count}");
    let known = compare(&plain, &short)?;
    println!("{entered} of {count} sequences short-circuited; {known} told of an end otherwise");
    Ok(())
}

#[test]
fn twin_without_the_rule_of_unread_bytes_they_are_overtaken() -> Result<()> {
    let scene = Scene::short("eager-short-circuit,skip-unread")?;
    let said = run(&scene.client, &scene.server_a, count());
    let error = said
        .map(|_| ())
        .expect_err("no byte was overtaken")
        .to_string();
    assert!(error.contains("is not what"), "{error}");
    Ok(())
}
