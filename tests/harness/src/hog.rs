//! A processor that nobody else can have for a while. Called by `culvert-probe`.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::sys;

/// After a second the kernel lets others run all the same.
const MOST: Duration = Duration::from_millis(900);

/// The first and the last processor that this thread may use; none if that is the same one.
pub fn two_processors() -> io::Result<Option<[usize; 2]>> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let mut all = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu) == Ok(true));
    Ok(all.next().zip(all.next_back()).map(<[usize; 2]>::from))
}

/// Keeps this thread on one processor.
pub fn stay_on(processor: usize) -> io::Result<()> {
    let mut only = CpuSet::new();
    only.set(processor)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &only)?)
}

/// Who takes all of a processor.
pub struct Hog {
    thread: JoinHandle<io::Result<bool>>,
    let_go: &'static AtomicBool,
}

impl Hog {
    /// Returns once nobody else runs there.
    pub fn on(processor: usize) -> io::Result<Self> {
        // One of them lives as long as its process.
        let [has_it, let_go]: [&'static AtomicBool; 2] =
            [(); 2].map(|()| &*Box::leak(Box::new(AtomicBool::new(false))));
        let thread = std::thread::spawn(move || {
            stay_on(processor)?;
            sys::become_urgent()?;
            let began = Instant::now();
            has_it.store(true, Ordering::Release);
            while !let_go.load(Ordering::Acquire) {
                if began.elapsed() > MOST {
                    return Ok(false);
                }
                std::hint::spin_loop();
            }
            Ok(true)
        });
        while !has_it.load(Ordering::Acquire) && !thread.is_finished() {
            std::thread::yield_now();
        }
        Ok(Self { thread, let_go })
    }

    /// Whether it had the processor until now.
    pub fn end(self) -> io::Result<bool> {
        self.let_go.store(true, Ordering::Release);
        let ended = self.thread.join();
        ended.map_err(|_| io::Error::other("a thread panicked"))?
    }
}
