//! Requests that wait for the model, first come first served, never more than a bound.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Job;
use crate::error::ApiError;
use crate::metrics::Metrics;

/// How long nothing has to come until that is told.
const PATIENCE: Duration = Duration::from_millis(if cfg!(test) { 100 } else { 5000 });

/// The queue of one model.
pub(super) struct Queue {
    capacity: usize,
    metrics: Arc<Metrics>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Job>,
    is_closed: bool,
    is_aborted: bool,
}

/// What the model's thread finds.
pub(super) enum Next {
    /// These, perhaps none, can begin now.
    Jobs(Vec<Job>),
    /// None came for a while.
    Nothing,
    /// Nothing will come any more.
    Closed,
    /// All that is left is to be refused.
    Aborted,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

impl Queue {
    pub(super) fn new(capacity: usize, metrics: Arc<Metrics>) -> Self {
        Self { capacity, metrics, state: Mutex::default(), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_full(&self) -> bool {
        self.lock().waiting.len() >= self.capacity
    }

    pub(super) fn push(&self, job: Job) -> Result<(), ApiError> {
        let mut state = self.lock();
        if state.is_closed {
            return Err(ApiError::shutting_down());
        }
        if state.waiting.len() >= self.capacity {
            // Places of those who have left are free.
            state.waiting.retain(Job::is_wanted);
        }
        if state.waiting.len() >= self.capacity {
            return Err(ApiError::overloaded());
        }
        state.waiting.push_back(job);
        self.metrics.queued.store(state.waiting.len(), Ordering::Relaxed);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// Takes the first requests, in order, as long as `fits` says so; waits for one if `is_idle`, but not for ever.
    pub(super) fn next(&self, is_idle: bool, mut fits: impl FnMut(&Job) -> bool) -> Next {
        let mut state = self.lock();
        let mut has_waited = false;
        loop {
            if state.is_aborted {
                return Next::Aborted;
            }
            state.waiting.retain(Job::is_wanted);
            let mut jobs = Vec::new();
            while state.waiting.front().is_some_and(&mut fits) {
                jobs.extend(state.waiting.pop_front());
            }
            self.metrics.queued.store(state.waiting.len(), Ordering::Relaxed);
            if !jobs.is_empty() || !is_idle {
                return Next::Jobs(jobs);
            }
            if state.is_closed {
                return Next::Closed;
            }
            if has_waited {
                return Next::Nothing;
            }
            let waited = self.changed.wait_timeout(state, PATIENCE).unwrap_or_else(PoisonError::into_inner);
            (state, has_waited) = (waited.0, waited.1.timed_out());
        }
    }

    pub(super) fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_all();
    }

    pub(super) fn abort(&self) {
        let mut state = self.lock();
        (state.is_closed, state.is_aborted) = (true, true);
        drop(state);
        self.changed.notify_all();
    }

    /// What still waits.
    pub(super) fn drain(&self) -> Vec<Job> {
        self.lock().waiting.drain(..).collect()
    }
}
