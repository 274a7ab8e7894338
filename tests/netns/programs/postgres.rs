//! PostgreSQL: pgbench and psql, which read with a blocking libpq. The server runs as a user of its own.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use culvert_harness::{Launch, Pod, Proc, wait_until};
use nix::sys::signal::Signal;

use crate::stage::{End, Least, Mode, STEP, Stage, compare};

const PORT: u16 = 5432;
const USER: &str = "postgres";

/// What the tables hold after the transactions, whatever their order.
const STATE: &str = "select count(*), sum(delta), sum(aid), sum(tid) from pgbench_history; \
                     select md5(string_agg(aid || ':' || abalance, ',' order by aid)) from pgbench_accounts; \
                     select sum(bbalance) from pgbench_branches; select sum(tbalance) from pgbench_tellers";

pub fn check(mode: Mode) -> Result<()> {
    compare(
        mode,
        &[(End::Client, End::Server, PORT)],
        Least {
            direct: 200,
            short: 16,
        },
        |stage, told| {
            let _server = serve(stage)?;
            let client = |program: &str| client(&stage.client, program, stage);
            let sql = |text: &str| -> Result<String> {
                client("psql")?
                    .args(["-qAtX", "-c", text])
                    .run(STEP)?
                    .success()
            };
            let benchmark = |options: &str| -> Result<String> {
                let launch = client("pgbench")?.args(["-n", "--random-seed=1"]);
                let said = launch.args(options.split(' ')).run(STEP)?.success()?;
                // Without the figures.
                let lines = said.lines().filter(|line| line.starts_with("number of "));
                Ok(lines.collect::<Vec<_>>().join("\n"))
            };
            client("pgbench")?.args(["-i", "-q"]).run(STEP)?.success()?;
            for (case, options) in [
                ("simple", "-c 8 -j 2 -t 100"),
                ("extended", "-c 8 -j 2 -t 100 -M extended"),
                ("prepared", "-c 8 -j 2 -t 100 -M prepared"),
                ("selects", "-c 8 -j 2 -t 500 -S"),
                ("connection each", "-c 4 -j 2 -t 50 -S -C"),
            ] {
                told.say(case, benchmark(options)?);
                told.say(case, sql(STATE)?);
            }
            // Long answers, and much to read for the server.
            let rows = "select g, md5(g::text), repeat(chr(65 + g % 26), g % 3000) from generate_series(1, 20000) g";
            let directory = stage.directory().display().to_string();
            let copied = client("psql")?.args([
                "-qX",
                "-c",
                &format!("\\copy ({rows}) to '{directory}/rows'"),
            ]);
            copied.run(STEP)?.success()?;
            told.say(
                "copied out",
                stage.shell(&format!("sha256sum < {directory}/rows"))?,
            );
            sql("create table rows (g int, hash text, filler text)")?;
            let back = client("psql")?.args([
                "-qX",
                "-c",
                &format!("\\copy rows from '{directory}/rows'"),
            ]);
            back.run(STEP)?.success()?;
            told.say(
                "copied in",
                sql("select count(*), md5(string_agg(hash || filler, '' order by g)) from rows")?,
            );
            told.say(
                "one long field",
                sql("select md5(repeat('x', 20000000)), length(repeat('x', 20000000))")?,
            );
            told.say("cancelled", cancelled(&client, &sql)?);
            Ok(())
        },
    )
}

/// A client that waits for an answer, and is told to give up: it says so to the server on another connection.
fn cancelled(
    client: &impl Fn(&str) -> Result<Launch>,
    sql: &impl Fn(&str) -> Result<String>,
) -> Result<String> {
    let waiting = client("psql")?
        .args(["-qAtX", "-c", "select pg_sleep(600)"])
        .spawn()?;
    wait_until(STEP, "the query to run", || {
        let count = sql(
            "select count(*) from pg_stat_activity where query = 'select pg_sleep(600)' and state = 'active'",
        )?;
        Ok((count.trim() == "1").then_some(()))
    })?;
    waiting.kill(Signal::SIGINT)?;
    let status = waiting.wait(STEP)?;
    Ok(format!("{status}\n{}", waiting.log().tail()))
}

/// Its programs, of the newest version there is.
fn programs() -> Result<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").context("is PostgreSQL installed?")?;
    let found = versions.filter_map(|version| Some(version.ok()?.path().join("bin")));
    found.max().context("no version of PostgreSQL")
}

fn client(pod: &Pod, program: &str, stage: &Stage) -> Result<Launch> {
    let launch = pod.command(programs()?.join(program));
    let launch = launch.env("PGHOST", stage.server.address().to_string());
    Ok(launch.env("PGUSER", USER).env("PGDATABASE", USER))
}

/// A new database each time.
fn serve(stage: &Stage) -> Result<Proc> {
    let data = stage.directory().join("postgres");
    let _ = std::fs::remove_dir_all(&data);
    stage.shell(&format!("install -d -m 700 -o {USER} {}", data.display()))?;
    let as_user = |program: &str| -> Result<Launch> {
        Ok(unprivileged(&stage.server, &programs()?.join(program))
            .arg("-D")
            .arg(&data))
    };
    let initdb = as_user("initdb")?.args([
        "-U",
        USER,
        "-A",
        "trust",
        "--no-sync",
        "--no-locale",
        "-E",
        "UTF8",
    ]);
    initdb.run(STEP)?.success()?;
    let access = data.join("pg_hba.conf");
    std::fs::write(&access, "host all all 0.0.0.0/0 trust\n")
        .with_context(|| format!("writing {}", access.display()))?;
    let mut server = as_user("postgres")?;
    for setting in [
        "listen_addresses=*",
        "unix_socket_directories=",
        "fsync=off",
        "max_connections=50",
    ] {
        server = server.args(["-c", setting]);
    }
    stage.serve(End::Server, PORT, server.args(["-p", &PORT.to_string()]))
}

/// The stage's files are root's alone, and PostgreSQL refuses to be root: it may pass through directories, no more.
fn unprivileged(pod: &Pod, program: &Path) -> Launch {
    let launch = pod
        .command("setpriv")
        .args(["--reuid", USER, "--regid", USER, "--clear-groups"]);
    let launch = launch.args([
        "--inh-caps",
        "+dac_read_search",
        "--ambient-caps",
        "+dac_read_search",
    ]);
    launch.arg(program)
}
