//! When the certificate of one identity is due for renewal, and how long to wait after a failure. Pure: clocks and chance are arguments.
//!
//! Validity goes by the wall clock, which may be stepped; waiting goes by the monotonic one, which may not. Driven by `Certificates`.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::certificate::WorkloadCertificate;
use super::crl::RevocationLists;

/// Both clocks, read at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    pub wall: SystemTime,
    pub monotonic: Instant,
}

impl Now {
    pub fn read() -> Self {
        Self {
            wall: SystemTime::now(),
            monotonic: Instant::now(),
        }
    }
}

/// Pace of renewals.
#[derive(Debug, Clone, Copy)]
pub struct RenewalSettings {
    /// How often certificates are compared with the wall clock.
    pub check_every: Duration,
    /// First wait after a failure; doubles with each further one.
    pub backoff_first: Duration,
    /// Longest wait after a failure.
    pub backoff_most: Duration,
    /// How long one request to the issuer may take.
    pub request_deadline: Duration,
    /// Requests under way at once.
    pub concurrent_requests: usize,
    /// Of those, how many are kept for identities that have no certificate to present.
    pub kept_for_new: usize,
}

impl RenewalSettings {
    /// For those without a certificate to present and for the others, in the order of their turns: up to how many requests under way another one begins.
    pub(super) fn places(&self) -> [(bool, usize); 2] {
        let all = self.concurrent_requests;
        [
            (true, all),
            (false, all.saturating_sub(self.kept_for_new).max(1)),
        ]
    }
}

impl Default for RenewalSettings {
    fn default() -> Self {
        Self {
            check_every: Duration::from_secs(2),
            backoff_first: Duration::from_millis(500),
            backoff_most: Duration::from_secs(60),
            request_deadline: Duration::from_secs(20),
            concurrent_requests: 16,
            kept_for_new: 4,
        }
    }
}

/// One identity's certificate and the attempts to replace it.
#[derive(Debug, Default)]
pub(super) struct Renewal {
    current: Option<Arc<WorkloadCertificate>>,
    failures: u32,
    not_until: Option<Instant>,
    under_way: bool,
    /// The certificate is on a revocation list.
    revoked: bool,
}

impl Renewal {
    /// The certificate, if it has not expired.
    pub(super) fn usable(&self, wall: SystemTime) -> Option<&Arc<WorkloadCertificate>> {
        self.current
            .as_ref()
            .filter(|certificate| !certificate.validity().expired(wall))
    }

    /// The certificate, expired or not.
    pub(super) fn latest(&self) -> Option<&Arc<WorkloadCertificate>> {
        self.current.as_ref()
    }

    pub(super) fn revoked(&self) -> bool {
        self.revoked
    }

    /// Looks the certificate up in lists that have just come into force. True if it is on one of them and was on none before: then it
    /// is due at once, however long the next attempt was to wait.
    pub(super) fn look_up(&mut self, lists: &RevocationLists) -> bool {
        let before = self.revoked;
        let revoked = |own: &Arc<WorkloadCertificate>| own.is_revoked(lists);
        self.revoked = self.current.as_ref().is_some_and(revoked);
        let news = self.revoked && !before;
        if news {
            self.not_until = None;
        }
        news
    }

    /// Whether to ask the issuer now. If so the caller must report back with `succeeded` or `failed`.
    pub(super) fn begin(&mut self, now: Now) -> bool {
        let due = self.revoked
            || self
                .current
                .as_ref()
                .is_none_or(|certificate| certificate.validity().renewal_due(now.wall));
        let waiting = self.not_until.is_some_and(|until| now.monotonic < until);
        let begin = due && !waiting && !self.under_way;
        self.under_way |= begin;
        begin
    }

    pub(super) fn succeeded(
        &mut self,
        certificate: Arc<WorkloadCertificate>,
        now: Now,
        settings: &RenewalSettings,
    ) {
        let still_due = certificate.validity().renewal_due(now.wall);
        *self = Self {
            current: Some(certificate),
            ..Self::default()
        };
        if still_due {
            // An issuer whose certificates are old at birth (or whose clock is off) must not be asked in a tight loop.
            self.not_until = now.monotonic.checked_add(settings.backoff_first);
        }
    }

    /// `chance` is uniform in 0..=u16::MAX; it spreads identities that failed together.
    pub(super) fn failed(&mut self, now: Now, settings: &RenewalSettings, chance: u16) {
        let wait = backoff(self.failures, settings, chance);
        self.under_way = false;
        self.failures = self.failures.saturating_add(1);
        self.not_until = now.monotonic.checked_add(wait);
    }
}

/// Between half and all of `first * 2^failures`, at most `most`.
fn backoff(failures: u32, settings: &RenewalSettings, chance: u16) -> Duration {
    let doubled = settings
        .backoff_first
        .saturating_mul(1_u32.checked_shl(failures).unwrap_or(u32::MAX));
    let half = doubled.min(settings.backoff_most) / 2;
    let part = half.saturating_mul(u32::from(chance)) / u32::from(u16::MAX);
    half.saturating_add(part)
}

#[cfg(test)]
mod tests {
    use super::super::dev_ca::DevCa;
    use super::*;
    use crate::policy::Identity;

    struct Case {
        renewal: Renewal,
        settings: RenewalSettings,
        start: Now,
        ca: DevCa,
        _directory: tempfile::TempDir,
    }

    impl Case {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let ca = DevCa::open(directory.path(), "cluster.local").unwrap();
            Self {
                renewal: Renewal::default(),
                settings: RenewalSettings::default(),
                start: Now::read(),
                ca,
                _directory: directory,
            }
        }

        fn after(&self, seconds: u64) -> Now {
            let passed = Duration::from_secs(seconds);
            Now {
                wall: self.start.wall + passed,
                monotonic: self.start.monotonic + passed,
            }
        }

        fn issue(&mut self, ttl: u64, now: Now) {
            let identity = Identity::parse("spiffe://cluster.local/ns/a/sa/b").unwrap();
            let certificate = self
                .ca
                .issue(&identity, Duration::from_secs(ttl), now.wall)
                .unwrap();
            self.renewal
                .succeeded(Arc::new(certificate), now, &self.settings);
        }
    }

    #[test]
    fn a_new_identity_is_fetched_at_once_and_only_once() {
        let mut case = Case::new();
        assert!(case.renewal.begin(case.start));
        assert!(!case.renewal.begin(case.start));
        case.issue(3600, case.start);
        assert!(!case.renewal.begin(case.after(1)));
    }

    #[test]
    fn a_certificate_is_renewed_at_half_of_its_life() {
        let mut case = Case::new();
        case.issue(3600, case.start);
        // Back-dated by 60 s: its life is 3660 s, of which 60 have passed.
        assert!(!case.renewal.begin(case.after(1768)));
        assert!(case.renewal.begin(case.after(1771)));
    }

    #[test]
    fn a_clock_stepped_forward_renews_and_hides_the_expired() {
        let mut case = Case::new();
        case.issue(3600, case.start);
        let stepped = Now {
            wall: case.start.wall + Duration::from_secs(7200),
            ..case.start
        };
        assert!(case.renewal.usable(stepped.wall).is_none());
        assert!(case.renewal.begin(stepped));
    }

    #[test]
    fn a_clock_stepped_back_renews() {
        let mut case = Case::new();
        case.issue(3600, case.start);
        let stepped = Now {
            wall: case.start.wall - Duration::from_secs(7200),
            ..case.start
        };
        assert!(case.renewal.begin(stepped));
    }

    #[test]
    fn a_valid_certificate_is_kept_while_renewal_fails() {
        let mut case = Case::new();
        case.issue(3600, case.start);
        let late = case.after(3000);
        assert!(case.renewal.begin(late));
        case.renewal.failed(late, &case.settings, 0);
        assert!(case.renewal.usable(late.wall).is_some());
        assert!(!case.renewal.begin(late));
        assert!(case.renewal.begin(case.after(3001)));
        assert!(case.renewal.usable(case.after(3600).wall).is_none());
    }

    #[test]
    fn failures_back_off_up_to_the_limit_and_success_forgets_them() {
        let mut case = Case::new();
        for _ in 0..100 {
            case.renewal.failed(case.start, &case.settings, u16::MAX);
        }
        assert!(!case.renewal.begin(case.after(59)));
        assert!(case.renewal.begin(case.after(60)));
        case.issue(3600, case.start);
        assert_eq!(case.renewal.failures, 0);
    }

    #[test]
    fn waits_double_and_lie_between_half_and_all() {
        let settings = RenewalSettings::default();
        for failures in 0..40 {
            let full =
                Duration::from_millis(500 * (1 << failures.min(20))).min(settings.backoff_most);
            assert_eq!(backoff(failures, &settings, 0), full / 2);
            assert_eq!(backoff(failures, &settings, u16::MAX), full);
        }
    }

    #[test]
    fn an_issuer_of_short_lived_certificates_is_not_asked_in_a_loop() {
        let mut case = Case::new();
        // Back-dating makes this one older than half its life from the start.
        case.issue(1, case.start);
        assert!(!case.renewal.begin(case.start));
        assert!(case.renewal.begin(case.after(1)));
    }
}
