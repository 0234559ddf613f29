//! How far a transfer is, on standard error.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{DecimalBytes, ProgressBar, ProgressStyle};

/// Between lines where standard error is no terminal.
const BETWEEN_LINES: Duration = Duration::from_secs(15);

/// A line that is drawn again and again on a terminal, and now and then a new one elsewhere.
pub(super) struct Progress {
    bar: ProgressBar,
    prints_lines: bool,
    n_done: u64,
    n_total: u64,
    last_line: Instant,
}

impl Progress {
    /// Of `n_total` bytes.
    pub(super) fn new(n_total: u64, is_shown: bool) -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let bar = if is_shown && is_terminal {
            let template =
                "{bar:24} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta} {wide_msg}";
            let style = ProgressStyle::with_template(template);
            ProgressBar::new(n_total).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        } else {
            ProgressBar::hidden()
        };
        Self { bar, prints_lines: is_shown && !is_terminal, n_done: 0, n_total, last_line: Instant::now() }
    }

    /// What is being fetched now.
    pub(super) fn name(&self, name: &str) {
        self.bar.set_message(name.to_owned());
    }

    /// So many bytes more are there.
    pub(super) fn add(&mut self, n_bytes: u64) {
        self.n_done += n_bytes;
        self.show();
    }

    /// So many bytes have to come again.
    pub(super) fn take_back(&mut self, n_bytes: u64) {
        self.n_done = self.n_done.saturating_sub(n_bytes);
        self.show();
    }

    fn show(&mut self) {
        self.bar.set_position(self.n_done);
        if self.prints_lines && self.last_line.elapsed() > BETWEEN_LINES {
            self.last_line = Instant::now();
            eprintln!("{} of {}", DecimalBytes(self.n_done), DecimalBytes(self.n_total));
        }
    }

    /// Says something beside the progress.
    pub(super) fn note(&self, text: &str) {
        self.bar.suspend(|| eprintln!("{text}"));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
