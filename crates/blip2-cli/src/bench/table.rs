//! A report for people.

use std::fmt::Write;

use blip2::benchmark::{Figure, Stage};
use indicatif::DecimalBytes;

use super::Report;

const HEADER: [&str; 9] =
    ["stage", "for", "median", "shortest", "longest", "GFLOP/s", "of best", "GB/s", "of best"];

pub(super) fn render(report: &Report) -> String {
    let mut text = String::new();
    let machine = &report.machine;
    let memory = |bytes: Option<u64>| bytes.map_or("unknown".into(), |n| DecimalBytes(n).to_string());
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{}, {}, {} threads", report.model, report.dtype, machine.threads);
    let _ = writeln!(
        text,
        "opened in {} with {} of memory; at most {} while it worked",
        duration(report.load_s),
        memory(report.loaded_memory),
        memory(report.peak_memory)
    );
    let rows: Vec<_> =
        std::iter::once(HEADER.map(String::from)).chain(report.stages.iter().map(row)).collect();
    let widths: [usize; 9] =
        std::array::from_fn(|i| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0));
    for row in &rows {
        let cells = row.iter().zip(widths).enumerate().map(|(i, (cell, width))| match i {
            0 | 1 => format!("{cell:width$}"),
            _ => format!("{cell:>width$}"),
        });
        let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    let by_kernels = match &machine.by_kernels[..] {
        [] => String::new(),
        some => format!(" ({} by the kernels themselves)", some.join(", ")),
    };
    let _ = writeln!(
        text,
        "this machine at best ({}): f32 {:.0}, bf16 {:.0}, int8 {:.0} GFLOP/s{by_kernels}, reading {:.1} GB/s",
        machine.isa,
        machine.products_f32 / 1e9,
        machine.products_bf16 / 1e9,
        machine.products_int8 / 1e9,
        machine.reading / 1e9
    );
    text
}

fn row(figure: &Figure) -> [String; 9] {
    let rate =
        |rate: Option<f64>, digits: usize| rate.map_or_else(String::new, |r| format!("{:.digits$}", r / 1e9));
    let share =
        |share: Option<f64>| share.map_or_else(String::new, |share| format!("{:.0} %", 100.0 * share));
    let (one, many, name) = match figure.stage {
        Stage::Preprocess => ("picture file", "picture files", "preprocess"),
        Stage::Vision => ("picture", "pictures", "vision"),
        Stage::Qformer => ("picture", "pictures", "Q-Former"),
        Stage::Match => ("text", "texts", "match"),
        Stage::Prefill => ("prompt", "prompts", "prefill"),
        Stage::Decode => ("token", "tokens", "decode"),
        Stage::Caption => ("picture", "pictures", "caption"),
    };
    let beams = match figure.beams {
        None => String::new(),
        Some(1) => ", greedy".into(),
        Some(n) => format!(", {n} beams"),
    };
    [
        format!("{name}{beams}"),
        format!("{} {}", figure.items, if figure.items == 1 { one } else { many }),
        duration(figure.median_s),
        duration(figure.min_s),
        duration(figure.max_s),
        rate(figure.operations_per_s, 1),
        share(figure.share_of_products),
        rate(figure.bytes_per_s, 1),
        share(figure.share_of_reading),
    ]
}

fn duration(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.2} ms", 1e3 * seconds) } else { format!("{seconds:.3} s") }
}

#[cfg(test)]
mod tests {
    use blip2::benchmark::Machine;

    use super::*;

    #[test]
    fn what_is_the_kernels_own_best_is_said() {
        let text = |by_kernels| {
            let machine = Machine {
                isa: "avx2",
                threads: 2,
                products_f32: 200e9,
                products_bf16: 200e9,
                products_int8: 300e9,
                by_kernels,
                reading: 30e9,
            };
            render(&Report {
                model: "tiny".into(),
                dtype: "f32",
                batch: 1,
                prompt_tokens: 8,
                tokens: 20,
                repeat: 3,
                load_s: 0.5,
                loaded_memory: None,
                peak_memory: None,
                stages: Vec::new(),
                machine,
            })
        };
        assert!(text(vec![]).contains("int8 300 GFLOP/s, reading 30.0 GB/s"), "{}", text(vec![]));
        let said = text(vec!["bf16", "int8"]);
        assert!(said.contains("int8 300 GFLOP/s (bf16, int8 by the kernels themselves), reading"), "{said}");
    }
}
