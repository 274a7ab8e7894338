//! The daemon: wires every part, follows the mesh, serves requests, and ends in order.
//!
//! Control (mesh, certificates, admin, telemetry) runs on the runtime that calls [`run`]; connections run on data threads.

mod counters;
mod crl;
mod direct_flows;
mod enforcer;
mod error;
mod handler;
mod knobs;
mod limits;
mod mesh_source;
mod outcomes;
mod pods;
mod readiness;
mod short_circuit;
mod signals;
mod unload;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{
    admin::{AdminSocket, HttpServers, http},
    config::{Config, Leniency},
    enrol::zds,
    identity::{
        self, CaClient, Certificates, DevCa, DevCaIssuer, Issuer, RenewalSettings, Revocations,
    },
    kernel::{HostProcesses, Kernel, KernelSettings, RoutingSettings, Tables, Verdicts, sys},
    mesh::{MeshDefaults, Revision, ShortCircuitMode, Store},
    policy::{DenyReason, PolicyName, Strictness},
    proxy::{Authority, Context, LaterPolicies, OpenConnections, Workers, hbone, tls},
    telemetry::{Telemetry, logging::LogGuard},
};

use crl::Crl;
use enforcer::{Enforcer, EnforcerSettings};
pub use error::NodeError;
use handler::{Handler, HandlerParts};
use mesh_source::MeshSource;
use outcomes::Outcomes;
use pods::Pods;
use readiness::Readiness;
use signals::Signals;
pub use unload::{UndonePod, Unloaded, unload};

/// How often what could not be written or cut is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often pods are looked at that may have ended.
const LOOK: Duration = Duration::from_secs(2);
/// How long nothing is answered, not even that there is no mesh yet, because one may be about to come.
const FIRST_WORD: Duration = Duration::from_secs(2);
/// How often the kernel part is told that the agent lives.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Runs the agent until SIGTERM, SIGINT or `/quitquitquit`, or until another agent takes its kernel part over. One that istio-cni
/// tells of its pods is kubelet's, which would start it anew, and it would take over from its successor, and so on: it stays, and
/// does nothing, until the signal.
///
/// `log` is where connections are logged.
pub async fn run(config: Config, cgroup_mount: PathBuf, log: &LogGuard) -> Result<(), NodeError> {
    let is_kubelet_s = config.inpod_uds.is_some();
    let end = serve(config, cgroup_mount, log).await?;
    if let End::TakenOver(mut signals) = end
        && is_kubelet_s
    {
        tracing::info!(
            "another agent serves this node: this one does nothing more, and waits for SIGTERM"
        );
        signals.wait().await;
    }
    Ok(())
}

/// Why an agent ends that could go on.
enum End {
    /// By a signal or a request.
    Asked,
    /// Its kernel part is another agent's by now. No signal was heard yet.
    TakenOver(Signals),
}

async fn serve(config: Config, cgroup_mount: PathBuf, log: &LogGuard) -> Result<End, NodeError> {
    let started = Instant::now();
    limits::raise_open_files();
    sys::keep_no_large_blocks();
    let knobs = knobs::Knobs::of(&config)?;
    for warning in config.lenient.warnings() {
        tracing::warn!("{warning}");
    }
    // Endpoints end first; what the open connections depend on (policy, certificates, the heartbeat) once they have ended too.
    let shutdown = CancellationToken::new();
    let control = CancellationToken::new();
    let mut tasks = JoinSet::new();

    let short_circuit = try_out().await;
    let kernel = KernelSettings {
        cgroup_root: config.cgroup_root.clone(),
        host: host_processes(&config, &cgroup_mount)?,
        cgroup_mount,
        pin_dir: config.pin_dir.clone(),
        verdict_max_age: config.verdict_max_age,
        telemetry: config.flow_telemetry,
        leave_alone: knobs.leave_alone,
        short_circuit: short_circuit.clone(),
        knobs: knobs.kernel,
    };
    // Before anything of another agent's is taken over: this one may not be allowed to start.
    Kernel::check(&kernel)?;
    let addresses = http::Addresses {
        stats: config.stats_address,
        readiness: config.readiness_address,
        admin: config.admin_address,
    };
    let http = HttpServers::bind(addresses, http::Limits::default())?;
    // Before the kernel part: another agent's pods must not be taken over by one that cannot be reached.
    let admin = AdminSocket::bind(&config.admin_socket, knobs.admin)?;

    let telemetry = Arc::new(Telemetry::logging_to(log.access_log()));
    // Before anybody is believed.
    let crl = Crl::start(&config, &control, &mut tasks)?;
    crl.count(&telemetry.metrics);
    let peers = tls::PeerChecks {
        revocations: crl.revocations.clone(),
        names: match config.lenient.about(Leniency::CertificateNames) {
            true => tls::CertificateNames::FirstOfSeveral,
            false => tls::CertificateNames::One,
        },
        knobs: knobs.proxy.tls,
    };
    let certificates = certificates(&config, crl.revocations.clone(), knobs.identity)?;
    {
        let (certificates, control) = (certificates.clone(), control.clone());
        tasks.spawn(async move {
            certificates.run(control).await;
            "renewal of certificates"
        });
    }

    let store = Arc::new(Store::new());
    let (source, demand) = MeshSource::start(
        &config,
        defaults(&config, &short_circuit),
        &store,
        &control,
        &mut tasks,
    )?;

    let (kernel, events, candidates) = Kernel::attach(&kernel)?;
    // What was read of the kernel's types is not needed any more.
    sys::give_back_memory();
    let short = kernel.short_circuit();
    let tables = Arc::clone(kernel.tables());
    {
        let (tables, diag) = (Arc::clone(&tables), Arc::clone(kernel.diag()));
        let read = move || counters::read(&tables, &diag);
        telemetry.metrics.set_kernel_source(read);
    }
    {
        let (tables, control, shutdown) = (Arc::clone(&tables), control.clone(), shutdown.clone());
        tasks.spawn(async move {
            let mut ticks = tokio::time::interval(HEARTBEAT);
            while control.run_until_cancelled(ticks.tick()).await.is_some() {
                match tables.beat() {
                    Ok(true) => {}
                    Ok(false) if shutdown.is_cancelled() => {}
                    Ok(false) => {
                        tracing::warn!("another agent has taken the kernel part over: this one ends its connections and stops");
                        shutdown.cancel();
                    }
                    Err(error) => {
                        tracing::error!(%error, "cannot tell the kernel part that the agent lives")
                    }
                }
            }
            "heartbeat"
        });
    }

    let later_policies = match config.lenient.about(Leniency::LaterPolicies) {
        true => LaterPolicies::Spare,
        false => LaterPolicies::Apply,
    };
    let enforcer = Arc::new(Enforcer::new(
        Arc::clone(&tables),
        EnforcerSettings {
            network: config.network.as_str().into(),
            trust_domain: config.trust_domain.as_str().into(),
            direct: config.direct,
            later_policies,
            skip_sweep: knobs.skip_sweep,
            skip_service_sync: knobs.skip_service_sync,
            keep_foreign_addresses: knobs.keep_foreign_addresses,
            keep_old_verdicts: knobs.keep_old_verdicts,
        },
    )?);
    let open = Arc::new(OpenConnections::new(later_policies));
    let failed = CancellationToken::new();
    let handshakes = !config.lenient.about(Leniency::HandshakeDeadlines);
    let handshake_deadline = handshakes.then_some(hbone::HANDSHAKE_DEADLINE);
    let context = Arc::new(Context {
        mesh: Arc::clone(&store),
        demand,
        network: config.network.as_str().into(),
        certificates: certificates.clone(),
        judge: Arc::clone(&enforcer) as Arc<dyn crate::proxy::Judge>,
        telemetry: Arc::clone(&telemetry),
        open: Arc::clone(&open),
        failed: failed.clone(),
        server: hbone::ServerSettings {
            handshake_deadline,
            grace: config
                .termination_grace_period
                .saturating_sub(Duration::from_secs(5)),
            ..hbone::ServerSettings::default()
        },
        authority: match config.lenient.about(Leniency::Authority) {
            true => Authority::OrBehindWaypoint,
            false => Authority::OwnAddress,
        },
        peers: peers.clone(),
        knobs: knobs.proxy,
    });
    let pool = hbone::PoolSettings {
        max_streams_per_connection: config.pool_max_streams,
        handshake_deadline,
        ..hbone::PoolSettings::default()
    };
    let threads = usize::try_from(config.threads).unwrap_or(1);
    let workers = Workers::start(threads, pool, &peers).map_err(NodeError::Threads)?;

    {
        let counting = source
            .clone()
            .count(Arc::clone(&telemetry), control.clone());
        tasks.spawn(async move {
            counting.await;
            "mesh counter"
        });
    }
    let pods = Arc::new(Pods::new(
        kernel,
        Arc::clone(&enforcer),
        workers,
        Arc::clone(&context),
        &config,
        RoutingSettings {
            redirect: config.redirect_mode,
            packet_mark: config.packet_mark,
            original_source: config.original_source,
            keep_fast_open: knobs.keep_fast_open,
        },
    ));
    let (cni, cni_status) = match &config.inpod_uds {
        Some(path) => {
            let (client, status) =
                zds::Client::new(path.clone(), Arc::clone(&pods), knobs.any_cni_user);
            (Some(client), Some(status))
        }
        None => (None, None),
    };
    let readiness = Arc::new(Readiness::new(source.clone(), cni_status));
    follow_mesh(
        &mut tasks,
        &control,
        Arc::clone(&enforcer),
        Arc::clone(&context),
    );
    let outcomes = Arc::new(Outcomes::default());
    {
        let feeder = direct_flows::DirectFlows::new(direct_flows::Sources {
            tables: Arc::clone(&tables),
            enforcer: Arc::clone(&enforcer),
            pods: Arc::clone(&pods),
            context: Arc::clone(&context),
            short: short.as_ref().ok().cloned(),
            outcomes: Arc::clone(&outcomes),
            report_interval: config.flow_report_interval,
            telemetry: config.flow_telemetry,
        });
        let control = control.clone();
        tasks.spawn(async move {
            feeder.run(events, control).await;
            "kernel events"
        });
    }

    match &short {
        Ok(short) => {
            let entries = short_circuit::Entries::new(short_circuit::Sources {
                short: Arc::clone(short),
                tables: Arc::clone(&tables),
                pods: Arc::clone(&pods),
                mesh: Arc::clone(&store),
                enforcer: Arc::clone(&enforcer),
                telemetry: Arc::clone(&telemetry),
                outcomes,
            });
            let control = control.clone();
            tasks.spawn(async move {
                entries.run(candidates, control).await;
                "short-circuit"
            });
        }
        Err(reason) => {
            tracing::info!(%reason, "no direct flow is short-circuited on this kernel");
        }
    }

    let handler = Arc::new(Handler::new(HandlerParts {
        config: config.clone(),
        started,
        pods: Arc::clone(&pods),
        store,
        certificates,
        telemetry,
        log_levels: log.levels(),
        readiness,
        crl,
        tables: Arc::clone(&tables),
        short,
        auto_short_circuits: auto_short_circuits(&short_circuit),
        shutdown: shutdown.clone(),
    }));
    // Requests are answered once there is a mesh to judge them by, or a reason why there is none.
    // Whoever asks is told that there is none, however late the control plane is.
    let _ = tokio::time::timeout(FIRST_WORD, source.first_word()).await;
    pods.restore().await;
    {
        let enforcer = Arc::clone(&enforcer);
        match tokio::task::spawn_blocking(move || enforcer.start()).await {
            Ok(Ok(0)) => {}
            Ok(Ok(cut)) => tracing::info!(cut, "direct flows that policy forbids by now were cut"),
            Ok(Err(error)) => {
                tracing::error!(%error, "the kernel part could not be brought in line with the mesh")
            }
            Err(error) => {
                tracing::error!(%error, "the kernel part was not brought in line with the mesh")
            }
        }
    }
    {
        let (pods, shutdown) = (Arc::clone(&pods), shutdown.clone());
        tasks.spawn(async move {
            let mut ticks = tokio::time::interval(RETRY);
            while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
                if !pods.waiting().is_empty() {
                    pods.retry().await;
                }
            }
            "pods that wait"
        });
    }
    if let Some(client) = cni {
        let (shutdown, control) = (shutdown.clone(), control.clone());
        tasks.spawn(async move {
            client.run(shutdown, control).await;
            "istio-cni's client"
        });
    }
    {
        let (pods, shutdown) = (Arc::clone(&pods), shutdown.clone());
        tasks.spawn(async move {
            let mut ticks = tokio::time::interval(LOOK);
            while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
                pods.release_ended().await;
                pods.give_back_memory().await;
            }
            "pods that have ended"
        });
    }
    {
        let (handler, shutdown) = (Arc::clone(&handler), shutdown.clone());
        tasks.spawn(async move {
            admin.serve(handler, shutdown).await;
            "admin socket"
        });
    }
    {
        let shutdown = shutdown.clone();
        tasks.spawn(async move {
            http.serve(handler, shutdown).await;
            "HTTP endpoints"
        });
    }
    tracing::info!(node = %config.node_name, version = env!("CARGO_PKG_VERSION"), "the agent is running");

    let outcome = supervise(&tables, &shutdown, &failed, &mut tasks).await;
    shutdown.cancel();
    pods.stop(
        config
            .termination_grace_period
            .saturating_sub(Duration::from_secs(5)),
    )
    .await;
    control.cancel();
    while tasks.join_next().await.is_some() {}
    tracing::info!(
        "the agent has stopped; direct flows go on, and their hooks stay until `culvert unload`"
    );
    outcome
}

/// What this kernel does with short-circuited sockets, or why it does nothing.
async fn try_out() -> Result<Verdicts, String> {
    let tried = tokio::task::spawn_blocking(Kernel::try_out_short_circuit).await;
    let verdicts = match tried {
        Ok(Ok(verdicts)) => verdicts?,
        // What the kernel refuses is told when it refuses it to the agent itself.
        Ok(Err(error)) => return Err(error.to_string()),
        Err(error) => return Err(error.to_string()),
    };
    match verdicts.forbids() {
        Some(reason) => Err(reason),
        None => Ok(verdicts),
    }
}

/// What `auto` means on this kernel.
fn auto_short_circuits(tried: &Result<Verdicts, String>) -> bool {
    tried.as_ref().is_ok_and(Verdicts::nothing_differs)
}

fn certificates(
    config: &Config,
    revocations: Revocations,
    knobs: identity::TestKnobs,
) -> Result<Certificates, NodeError> {
    let issuer: Arc<dyn Issuer> = match (&config.dev_ca, mesh_source::authority(config)) {
        (Some(directory), _) => {
            let ca = DevCa::open(directory, &config.trust_domain)?;
            tracing::warn!(
                directory = %directory.display(),
                "certificates come from a development CA whose key lies on this disk: not for production"
            );
            Arc::new(DevCaIssuer::new(Arc::new(ca), config.secret_ttl))
        }
        (None, Some(channel)) => Arc::new(CaClient::new(channel, config.secret_ttl, knobs)),
        (None, None) => return Err(NodeError::NoCa),
    };
    let settings = RenewalSettings::default();
    Ok(Certificates::new(issuer, settings, revocations, knobs))
}

/// Which processes are kubelet and the like.
fn host_processes(
    config: &Config,
    cgroup_mount: &Path,
) -> Result<Option<HostProcesses>, NodeError> {
    if !config.pass_node_probes {
        return Ok(None);
    }
    let usual = || HostProcesses::usual_pods_cgroup(cgroup_mount);
    let Some(pods) = config.pods_cgroup.clone().or_else(usual) else {
        tracing::warn!(
            "kubelet's cgroup for pods was not found: probes of the node are judged by policy like any other connection; name the cgroup with CULVERT_PODS_CGROUP"
        );
        return Ok(None);
    };
    Ok(Some(HostProcesses::find(&config.host_netns, &pods)?))
}

fn defaults(config: &Config, tried: &Result<Verdicts, String>) -> MeshDefaults {
    MeshDefaults {
        trust_domain: config.trust_domain.as_str().into(),
        network: config.network.as_str().into(),
        short_circuit: config.short_circuit,
        auto_short_circuit: if auto_short_circuits(tried) {
            ShortCircuitMode::On
        } else {
            ShortCircuitMode::Off
        },
        strictness: Strictness {
            unknown_policy_refuses: !config.lenient.about(Leniency::UnknownPolicies),
        },
    }
}

/// Brings kernel and open connections in line with each new mesh.
fn follow_mesh(
    tasks: &mut JoinSet<&'static str>,
    control: &CancellationToken,
    enforcer: Arc<Enforcer>,
    context: Arc<Context>,
) {
    let mut news = context.mesh.subscribe();
    if context.mesh.revision() > Revision::default() {
        news.mark_changed();
    }
    let control = control.clone();
    tasks.spawn(async move {
        // One change at a time, and the newest: what was skipped is contained in it.
        let mut retries = tokio::time::interval(RETRY);
        loop {
            let changed = async {
                tokio::select! {
                    changed = news.changed() => changed.map(|()| true),
                    _ = retries.tick() => Ok(false),
                }
            };
            let Some(Ok(changed)) = control.run_until_cancelled(changed).await else {
                break;
            };
            let (enforcer, context) = (Arc::clone(&enforcer), Arc::clone(&context));
            let applied = tokio::task::spawn_blocking(move || {
                if !changed {
                    return (0, enforcer.retry());
                }
                let mesh = context.mesh.load();
                let proxied = context.open.reauthorize(&mesh, context.knobs);
                let direct = enforcer.apply(mesh);
                (proxied, direct)
            });
            match applied.await {
                Ok((proxied, Ok(direct))) if proxied + direct > 0 => {
                    tracing::info!(direct, proxied, "policy changed: open connections were cut");
                }
                Ok((_, Ok(_))) => {}
                Ok((_, Err(error))) => {
                    tracing::error!(%error, "the kernel part could not follow a change of the mesh")
                }
                Err(error) => tracing::error!(%error, "a change of the mesh was not applied"),
            }
        }
        "mesh follower"
    });
}

/// Waits for the end: asked for, or because a part ended that must not.
async fn supervise(
    tables: &Tables,
    shutdown: &CancellationToken,
    failed: &CancellationToken,
    tasks: &mut JoinSet<&'static str>,
) -> Result<End, NodeError> {
    let mut signals = Signals::new()?;
    tokio::select! {
        // In this order: once the end was asked for, parts end as they should.
        biased;
        () = signals.wait() => Ok(End::Asked),
        () = shutdown.cancelled() => Ok(match tables.is_owner() {
            true => End::Asked,
            false => End::TakenOver(signals),
        }),
        () = failed.cancelled() => Err(NodeError::Ended("a listener of a pod".to_owned())),
        ended = tasks.join_next() => Err(match ended {
            Some(Ok(part)) => NodeError::Ended(part.to_owned()),
            Some(Err(error)) => NodeError::Ended(error.to_string()),
            None => NodeError::Ended("everything".to_owned()),
        }),
    }
}

/// The policy a refusal names.
fn policy_of(reason: &DenyReason) -> Option<&PolicyName> {
    match reason {
        DenyReason::MatchedDeny(name) | DenyReason::UnknownPolicy(name) => Some(name),
        DenyReason::NoAllowMatched => None,
    }
}
