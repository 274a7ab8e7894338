//! The benchmark from end to end, in its shortest form: every row is there, and nothing is missing that exists.

use std::process::Command;

use serde_json::Value;

const CASES: [(&str, &str); 12] = [
    ("rr_1", "p50_us"),
    ("rr_1k", "p50_us"),
    ("rr_16k", "p50_us"),
    ("stream_64", "gbit_s"),
    ("stream_1k", "gbit_s"),
    ("stream_16k", "gbit_s"),
    ("stream_128k", "gbit_s"),
    ("conn_close", "per_s"),
    ("redis_get", "per_s"),
    ("nginx_keepalive", "per_s"),
    ("cpu_per_mreq", "cpu_s"),
    ("cpu_per_gib", "cpu_s"),
];
const KEYS: [&str; 9] = [
    "case",
    "metric",
    "plain",
    "direct",
    "short_circuit",
    "proxy",
    "ratio_direct",
    "ratio_short_circuit",
    "spread",
];
const MEASURED: [&str; 4] = ["plain", "direct", "proxy", "ratio_direct"];

#[test]
fn bench_gives_every_row_with_every_figure_there_is() {
    let output = Command::new(env!("CARGO_BIN_EXE_culvert-bench"))
        .args(["same-node", "--smoke", "--json"])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();

    let rows = report["rows"].as_array().unwrap();
    let names: Vec<_> = rows
        .iter()
        .map(|row| {
            (
                row["case"].as_str().unwrap(),
                row["metric"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(names, CASES);
    for row in rows {
        let object = row.as_object().unwrap();
        assert!(
            object.len() == KEYS.len() && KEYS.iter().all(|key| object.contains_key(*key)),
            "{row}"
        );
        for key in MEASURED {
            assert!(
                row[key].as_f64().is_some_and(|value| value > 0.0),
                "{key} of {row}"
            );
        }
        assert_eq!(row["spread"].as_array().map(Vec::len), Some(2), "{row}");
    }

    let hooks = report["extra"]["hooks"]["programs"].as_array().unwrap();
    assert!(
        hooks.iter().any(|hook| hook["load"] == "conn_bare"),
        "nothing of the kernel part ran at connect: {hooks:?}"
    );
    for cost in report["extra"]["hooks"]["connect"].as_array().unwrap() {
        assert!(cost["ns_per_connect"].is_f64(), "{cost}");
    }
}
