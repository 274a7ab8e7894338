//! Files that are annotations, and files that are not; what those that are do to a mesh is in the tests of `feed` and `client`.

use super::*;

fn parsed(text: &str) -> Result<Namespaces, AnnotationsError> {
    Ok(parse(Path::new("/a.yaml"), text.as_bytes())?.0)
}

fn refused(text: &str) -> String {
    parsed(text).unwrap_err().to_string()
}

#[test]
fn a_file_speaks_of_namespaces_deployments_and_pods() {
    let read = parsed(
        "namespaces:\n\
         - name: bank\n  annotations: {culvert.dev/direct: \"off\"}\n\
         - name: shop\n  annotations: {}\n\
         workloads:\n\
         - namespace: bank\n  workloadName: web\n  annotations: {culvert.dev/direct: on}\n\
         - namespace: bank\n  name: web-1\n  annotations: {culvert.dev/short-circuit: \"on,80=off\"}\n\
         - namespace: bank\n  name: web\n  annotations: {culvert.dev/direct: off}\n",
    )
    .unwrap();
    let bank = &read["bank"];
    assert_eq!(bank.general.direct, Some(false));
    assert_eq!(bank.deployments["web"].direct, Some(true));
    assert_eq!(bank.pods["web"].direct, Some(false));
    let short_circuit = "on,80=off".parse().unwrap();
    assert_eq!(bank.pods["web-1"].short_circuit, Some(short_circuit));
    assert_eq!(read["shop"], NamespaceAnnotations::default());
    assert!(parsed("namespaces: []\n").unwrap().is_empty());
}

#[test]
fn what_is_not_meant_for_us_or_not_clear_is_refused_by_name() {
    let pod = |more: &str| format!("workloads:\n- namespace: a\n{more}");
    let off = "  annotations: {culvert.dev/direct: off}\n";
    let cases = [
        (String::new(), "/a.yaml says nothing"),
        ("workloads: 7\n".to_owned(), "/a.yaml:1:12: "),
        ("services: []\n".to_owned(), "services"),
        (
            "namespaces:\n- name: a\n  annotations: {culvert.dev/dirct: off}\n".to_owned(),
            "/a.yaml:3:36: there is no annotation culvert.dev/dirct",
        ),
        (
            "namespaces:\n- name: a\n  annotations: {culvert.de/direct: off}\n".to_owned(),
            "there is no annotation culvert.de/direct",
        ),
        (
            "namespaces:\n- name: a\n  annotations: {culvert.dev/direct: maybe}\n".to_owned(),
            "culvert.dev/direct: \"maybe\" is neither on nor off",
        ),
        (
            "namespaces:\n- name: a\n  annotations: {culvert.dev/direct: on, culvert.dev/direct: off}\n"
                .to_owned(),
            "occurs twice",
        ),
        ("namespaces:\n- name: a\n".to_owned(), "annotations"),
        (
            format!("namespaces:\n- name: a\n{off}- name: a\n{off}"),
            "the namespace a occurs twice",
        ),
        (
            pod(&format!("  name: p\n{off}- namespace: a\n  name: p\n{off}")),
            "the pod a/p occurs twice",
        ),
        (
            pod(&format!(
                "  workloadName: p\n{off}- namespace: a\n  workloadName: p\n{off}"
            )),
            "the deployment a/p occurs twice",
        ),
        (pod(off), "has no name"),
        (
            pod(&format!("  name: p\n  workloadName: p\n{off}")),
            "has both names",
        ),
        (
            pod(&format!("  name: p\n  workload-name: p\n{off}")),
            "workload-name",
        ),
        (pod(&format!("  name: \"\"\n{off}")), "is not a name"),
        (pod("  name: p\n"), "annotations"),
    ];
    for (text, says) in cases {
        let error = refused(&text);
        assert!(error.contains(says), "{text}gave {error}");
    }
    assert!(parsed("\u{0}").is_err());
    assert!(parse(Path::new("/a.yaml"), &[0xff, 0xfe]).is_err());
}

#[test]
fn a_deployment_and_a_pod_may_have_the_same_name_in_two_namespaces() {
    let entry = |namespace: &str, key: &str| {
        format!(
            "- namespace: {namespace}\n  {key}: x\n  annotations: {{culvert.dev/direct: off}}\n"
        )
    };
    let text = format!(
        "workloads:\n{}{}{}",
        entry("a", "name"),
        entry("a", "workloadName"),
        entry("b", "name")
    );
    assert_eq!(parsed(&text).unwrap().len(), 2);
}
