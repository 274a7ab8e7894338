//! What an annotation may say, and whose word counts for which port.

use proptest::prelude::*;

use super::ShortCircuitMode::{Auto, Off, On};
use super::*;
use crate::mesh::{
    Annotations, Mesh, MeshDefaults, MeshResources, Namespace, Workload, WorkloadSpec,
};

fn annotation(text: &str) -> ShortCircuitAnnotation {
    text.parse().unwrap()
}

/// What holds for a pod, by its own annotation, its namespace's and the agent's setting; an empty text is no annotation.
fn resolved(pod: &str, namespace: &str, agent: ShortCircuitMode) -> ShortCircuit {
    let annotations = |text: &str| Annotations {
        short_circuit: (!text.is_empty()).then(|| annotation(text)),
        ..Annotations::default()
    };
    let resources = MeshResources {
        workloads: vec![WorkloadSpec {
            uid: "pod".into(),
            name: "pod".into(),
            namespace: "ns".into(),
            annotations: annotations(pod),
            ..WorkloadSpec::default()
        }],
        namespaces: vec![Namespace {
            name: "ns".into(),
            annotations: annotations(namespace),
        }],
        ..MeshResources::default()
    };
    let defaults = MeshDefaults {
        short_circuit: agent,
        ..MeshDefaults::default()
    };
    let mesh = Mesh::build(resources, &defaults).unwrap();
    let workload: &Workload = mesh.workload_by_uid("pod").unwrap();
    workload.short_circuit.clone()
}

#[test]
fn nobody_who_speaks_leaves_it_to_the_default() {
    let nothing = resolved("", "", MeshDefaults::default().short_circuit);
    assert_eq!(nothing, ShortCircuit::from(Off));
    assert!(!nothing.is_on_somewhere());
}

#[test]
fn the_most_specific_word_about_a_port_counts() {
    for (pod, namespace, agent, modes) in [
        // Modes of the ports 1, 2 and 3.
        ("", "", On, [On, On, On]),
        ("", "", Off, [Off, Off, Off]),
        ("", "off", On, [Off, Off, Off]),
        ("on", "off", Off, [On, On, On]),
        ("off", "on", On, [Off, Off, Off]),
        // What cannot be told on this kernel stays off.
        ("auto", "", On, [Off, Off, Off]),
        ("on,2=off", "", Auto, [On, Off, On]),
        // A list without a general mode leaves the other ports to the namespace, with its ports, and then to the agent.
        ("2=on", "", Off, [Off, On, Off]),
        ("2=on", "off", On, [Off, On, Off]),
        ("2=on", "off,3=on", Auto, [Off, On, On]),
        ("2=on", "2=off,3=on", Auto, [Off, On, On]),
        ("", "3=off", On, [On, On, Off]),
        // A general mode is a word about every port: nothing of the namespace is left.
        ("off", "on,2=on", On, [Off, Off, Off]),
        ("off,1=on", "2=on", On, [On, Off, Off]),
    ] {
        let short_circuit = resolved(pod, namespace, agent);
        let found = [1, 2, 3].map(|port| short_circuit.mode(port));
        assert_eq!(found, modes, "{pod:?} over {namespace:?} over {agent}");
    }
}

#[test]
fn it_is_on_somewhere_where_a_port_is_on() {
    for (text, somewhere) in [
        ("on", true),
        ("on,1=off", true),
        ("off,65535=on", true),
        ("1=on", true),
        ("off", false),
        ("auto,1=off,2=auto", false),
    ] {
        let found = resolved(text, "", Auto).is_on_somewhere();
        assert_eq!(found, somewhere, "{text}");
    }
}

#[test]
fn the_order_of_ports_and_spaces_after_commas_mean_nothing() {
    assert_eq!(
        annotation("auto, 6379=on, 5432=off"),
        annotation("auto,5432=off,6379=on")
    );
}

#[test]
fn what_is_not_understood_is_refused() {
    let item = |text: &str| ShortCircuitError::Item(text.to_owned());
    let mode = |text: &str| ShortCircuitError::Mode(text.to_owned());
    let port = |text: &str| ShortCircuitError::Port(text.to_owned());
    let twice = ShortCircuitError::Twice(NonZeroU16::new(6379).unwrap());
    for (text, error) in [
        ("", ShortCircuitError::Empty),
        (" ", ShortCircuitError::Empty),
        ("on,", ShortCircuitError::Empty),
        (",6379=on", ShortCircuitError::Empty),
        ("on,,6379=on", ShortCircuitError::Empty),
        ("ON", item("ON")),
        ("true", item("true")),
        ("6379", item("6379")),
        ("6379:on", item("6379:on")),
        ("6379=on;5432=on", mode("on;5432=on")),
        ("6379=", mode("")),
        ("6379= on", mode(" on")),
        ("6379=on=on", mode("on=on")),
        ("=on", port("")),
        ("0=on", port("0")),
        ("65536=on", port("65536")),
        ("+80=on", port("+80")),
        ("-1=on", port("-1")),
        ("redis=on", port("redis")),
        ("80-90=on", port("80-90")),
        ("on,off", ShortCircuitError::NotFirst(Off)),
        ("6379=on,auto", ShortCircuitError::NotFirst(Auto)),
        ("6379=on,6379=on", twice.clone()),
        ("6379=on,06379=off", twice),
    ] {
        assert_eq!(
            text.parse::<ShortCircuitAnnotation>(),
            Err(error),
            "{text:?}"
        );
    }
}

#[test]
fn the_number_of_ports_is_bounded() {
    let ports = |count: usize| (1..=count).map(|port| format!("{port}=on"));
    let list = |count| ports(count).collect::<Vec<_>>().join(",");
    let most = annotation(&format!("off,{}", list(MOST_PORTS)));
    assert_eq!(most.ports.len(), MOST_PORTS);
    assert_eq!(
        list(MOST_PORTS + 1).parse::<ShortCircuitAnnotation>(),
        Err(ShortCircuitError::TooMany)
    );
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "[0-9a-z=, +]{0,40}") {
        let _ = text.parse::<ShortCircuitAnnotation>();
    }

    #[test]
    fn every_port_has_the_mode_that_is_written(port in 1..=u16::MAX) {
        let read = resolved(&format!("off,{port}=on"), "", Auto);
        prop_assert_eq!(read.mode(port), On);
        prop_assert_eq!(read.mode(port.wrapping_add(1)), Off);
    }
}
