//! The loss curves of a run as a picture: an SVG written by hand, from the run's log.

use std::fmt::Write as _;
use std::path::Path;

use crate::log::StepValues;
use crate::{Error, Result};

/// One named curve: `(step, value)` in the order of steps. A value that is not finite interrupts it.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// What the legend says.
    pub name: String,
    /// Where it goes.
    pub points: Vec<(f64, f64)>,
}

impl Curve {
    /// The values of one name in a log; steps without it are skipped.
    #[must_use]
    pub fn of(name: &str, steps: &[StepValues]) -> Self {
        let points = steps.iter().filter_map(|step| Some((step.step as f64, step.get(name)?))).collect();
        Self { name: name.to_owned(), points }
    }
}

/// How a plot looks.
#[derive(Debug, Clone, PartialEq)]
pub struct Style {
    /// Over the plot.
    pub title: String,
    /// Beside the vertical axis.
    pub y_label: String,
    /// Whether the vertical axis is logarithmic; values up to 0 are then left out.
    pub log_scale: bool,
    /// Over how many points the strong line averages (exponentially); the values themselves are a faint line behind
    /// it. Up to 1, there is only the line of the values.
    pub smoothing: f64,
}

/// Reads a run's log and writes the curves of the named values as an SVG file.
///
/// # Errors
/// [`Error::Io`], [`Error::File`] for a log that cannot be read or has none of the values.
pub fn plot_log(log: &Path, names: &[&str], style: &Style, svg_path: &Path) -> Result<()> {
    let steps = crate::log::read(log)?;
    let curves: Vec<Curve> =
        names.iter().map(|name| Curve::of(name, &steps)).filter(|c| !c.points.is_empty()).collect();
    if curves.is_empty() {
        let reason = format!("nothing to plot: no step has any of {}", names.join(", "));
        return Err(Error::File { path: log.to_owned(), reason });
    }
    std::fs::write(svg_path, svg(&curves, style))
        .map_err(|source| Error::Io { path: svg_path.to_owned(), source })
}

/// Dark enough on white and told apart by the colour-blind (Okabe and Ito).
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#aa4499", "#c98a00", "#56b4e9", "#222222"];

/// The smallest value on a logarithmic axis: 0 has no place there, and no loss is smaller than single precision.
const SMALLEST_LOG: f64 = f32::MIN_POSITIVE as f64;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 480.0;
/// The area of the curves.
const LEFT: f64 = 72.0;
const RIGHT: f64 = WIDTH - 190.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = HEIGHT - 52.0;

/// Draws the curves.
#[must_use]
pub fn svg(curves: &[Curve], style: &Style) -> String {
    let curves: Vec<Drawn<'_>> = curves.iter().map(|curve| Drawn::new(curve, style)).collect();
    let x = Axis::steps(&curves);
    let y = Axis::values(&curves, style.log_scale);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#222\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n\
         <clipPath id=\"area\"><rect x=\"{LEFT}\" y=\"{TOP}\" width=\"{}\" height=\"{}\"/></clipPath>\n",
        RIGHT - LEFT,
        BOTTOM - TOP
    );
    let center = (LEFT + RIGHT) / 2.0;
    text(&mut svg, center, 26.0, "middle\" font-size=\"16\" font-weight=\"bold", &style.title);
    draw_axes(&mut svg, &x, &y, &style.y_label);
    for (i, curve) in curves.iter().enumerate() {
        curve.draw(&mut svg, &x, &y, COLOURS[i % COLOURS.len()]);
    }
    for (i, curve) in curves.iter().enumerate() {
        let (line, colour) = (TOP + 14.0 + 22.0 * i as f64, COLOURS[i % COLOURS.len()]);
        let (from, to, level) = (RIGHT + 16.0, RIGHT + 38.0, line - 4.0);
        let _ = writeln!(svg, "<path d=\"M{from} {level}H{to}\" stroke=\"{colour}\" stroke-width=\"3\"/>");
        text(&mut svg, to + 8.0, line, "start", &curve.legend());
    }
    svg.push_str("</svg>\n");
    svg
}

fn draw_axes(svg: &mut String, x: &Axis, y: &Axis, y_label: &str) {
    for tick in x.ticks() {
        let at = x.place(tick);
        let _ = writeln!(svg, "<path d=\"M{at:.1} {TOP}V{BOTTOM}\" stroke=\"#eee\"/>");
        text(svg, at, BOTTOM + 20.0, "middle", &label(tick));
    }
    for tick in y.ticks() {
        let at = y.place(tick);
        let _ = writeln!(svg, "<path d=\"M{LEFT} {at:.1}H{RIGHT}\" stroke=\"#e4e4e4\"/>");
        text(svg, LEFT - 8.0, at + 4.5, "end", &label(tick));
    }
    let _ = writeln!(svg, "<path d=\"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}\" fill=\"none\" stroke=\"#444\"/>");
    text(svg, (LEFT + RIGHT) / 2.0, BOTTOM + 42.0, "middle", "step");
    let middle = (TOP + BOTTOM) / 2.0;
    text(svg, 20.0, middle, &format!("middle\" transform=\"rotate(-90 20 {middle})"), y_label);
}

/// `anchor` may carry further attributes after the anchor's name.
fn text(svg: &mut String, x: f64, y: f64, anchor: &str, content: &str) {
    let content = content.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    // What XML does not allow at all.
    let content: String = content.chars().filter(|c| !c.is_control()).collect();
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{content}</text>");
}

/// A curve as it is drawn: its visible values and their moving average.
struct Drawn<'a> {
    name: &'a str,
    /// Runs of points without a gap.
    values: Vec<Vec<(f64, f64)>>,
    average: Vec<Vec<(f64, f64)>>,
}

impl<'a> Drawn<'a> {
    fn new(curve: &'a Curve, style: &Style) -> Self {
        // Beyond single precision there is no loss, only overflow in what follows.
        let is_visible =
            |value: f64| (value as f32).is_finite() && (!style.log_scale || value > SMALLEST_LOG);
        let runs = curve.points.split(|point| !is_visible(point.1));
        let values: Vec<Vec<_>> = runs.filter(|run| !run.is_empty()).map(<[_]>::to_vec).collect();
        let average = moving_average(&values, style.smoothing);
        Self { name: &curve.name, values, average }
    }

    fn legend(&self) -> String {
        match self.average.last().and_then(|run| run.last()) {
            Some(&(_, last)) => format!("{} {}", self.name, label(significant(last))),
            None => format!("{} (no value)", self.name),
        }
    }

    fn draw(&self, svg: &mut String, x: &Axis, y: &Axis, colour: &str) {
        let is_smoothed = self.average != self.values;
        let mut draw = |runs: &[Vec<(f64, f64)>], look: &str| {
            let path: String = runs.iter().map(|run| path(run, x, y)).collect();
            let _ = writeln!(
                svg,
                "<path d=\"{path}\" clip-path=\"url(#area)\" fill=\"none\" stroke=\"{colour}\" \
                 stroke-linejoin=\"round\" stroke-linecap=\"round\" {look}/>"
            );
        };
        if is_smoothed {
            draw(&self.values, "stroke-width=\"1\" stroke-opacity=\"0.25\"");
        }
        draw(&self.average, "stroke-width=\"2\"");
    }
}

/// The exponential average over about `window` points, without the pull towards 0 at the start.
fn moving_average(runs: &[Vec<(f64, f64)>], window: f64) -> Vec<Vec<(f64, f64)>> {
    let keep = 1.0 - 1.0 / window.max(1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let mut next = |&(step, value): &(f64, f64)| {
        sum = keep * sum + (1.0 - keep) * value;
        weight = keep * weight + (1.0 - keep);
        (step, sum / weight)
    };
    runs.iter().map(|run| run.iter().map(&mut next).collect()).collect()
}

/// Path commands for a run of points. Per column of the picture only the first, lowest, highest and last point are
/// drawn: the picture is the same and its size does not grow with the run.
fn path(run: &[(f64, f64)], x: &Axis, y: &Axis) -> String {
    let mut path = String::new();
    for column in run.chunk_by(|a, b| x.place(a.0).floor() == x.place(b.0).floor()) {
        let last = column.len() - 1;
        let by_value = |a: &usize, b: &usize| column[*a].1.total_cmp(&column[*b].1);
        let lowest = (0..=last).min_by(by_value).unwrap_or(0);
        let highest = (0..=last).max_by(by_value).unwrap_or(0);
        let mut drawn = [0, lowest, highest, last];
        drawn.sort_unstable();
        for (i, &at) in drawn.iter().enumerate() {
            if i == 0 || drawn[i - 1] != at {
                let command = if path.is_empty() { 'M' } else { 'L' };
                let _ = write!(path, "{command}{:.1} {:.1}", x.place(column[at].0), y.place(column[at].1));
            }
        }
    }
    if run.len() == 1 {
        path.push_str("h0"); // a dot, by its round ends
    }
    path
}

/// Maps values to places in the picture.
struct Axis {
    low: f64,
    high: f64,
    /// Where `low` and `high` are drawn.
    ends: (f64, f64),
    log_scale: bool,
}

impl Axis {
    fn steps(curves: &[Drawn<'_>]) -> Self {
        let steps = curves.iter().flat_map(|c| c.values.iter().flatten()).map(|point| point.0);
        let (low, high) = widened(range(steps));
        Self { low, high, ends: (LEFT, RIGHT), log_scale: false }
    }

    /// Shows the averages whole and the values but for the most extreme hundredth at each end, so that one spike does
    /// not press everything else flat.
    fn values(curves: &[Drawn<'_>], log_scale: bool) -> Self {
        let mut values: Vec<f64> =
            curves.iter().flat_map(|c| c.values.iter().flatten()).map(|p| p.1).collect();
        values.sort_by(f64::total_cmp);
        let trimmed = values.len() / 100;
        let bulk = &values[trimmed..values.len() - trimmed];
        let averages = curves.iter().flat_map(|c| c.average.iter().flatten()).map(|point| point.1);
        let (mut low, mut high) = range(bulk.iter().copied().chain(averages));
        if log_scale {
            (low, high) = (low / 1.1, high * 1.1);
        } else {
            (low, high) = widened((low, high));
            let margin = 0.04 * (high - low);
            // Losses live above 0; do not show space below it.
            (low, high) = (if low >= 0.0 { (low - margin).max(0.0) } else { low - margin }, high + margin);
        }
        Self { low, high, ends: (BOTTOM, TOP), log_scale }
    }

    fn place(&self, value: f64) -> f64 {
        let scale = |value: f64| if self.log_scale { value.ln() } else { value };
        let share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low));
        // Far outside is clipped anyway, and must stay a number that every viewer can read.
        self.ends.0 + share.clamp(-10.0, 10.0) * (self.ends.1 - self.ends.0)
    }

    /// Round numbers along the axis, about seven of them.
    fn ticks(&self) -> Vec<f64> {
        let decades = (self.high / self.low).log10();
        if self.log_scale && decades > 0.7 {
            let factors: &[f64] = if decades > 3.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
            let exponents = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
            let stride = (decades / 8.0).ceil().max(1.0) as usize;
            let all = exponents.step_by(stride).flat_map(|e| factors.iter().map(move |f| f * 10f64.powi(e)));
            return all.filter(|tick| (self.low..=self.high).contains(tick)).collect();
        }
        let rough = (self.high - self.low) / 7.0;
        let power = 10f64.powi(rough.log10().floor() as i32);
        let stride =
            [1.0, 2.0, 5.0, 10.0].map(|f| f * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
        let first = (self.low / stride).ceil() as i64;
        (first..first + 20).map(|i| i as f64 * stride).take_while(|tick| *tick <= self.high).collect()
    }
}

/// The smallest and largest value.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (v.min(l), v.max(h)));
    if low <= high { (low, high) } else { (0.1, 1.0) } // no value at all
}

/// The range made longer at both ends where it is next to nothing.
fn widened((low, high): (f64, f64)) -> (f64, f64) {
    let size = low.abs().max(high.abs()).max(0.1);
    if high - low > 1e-9 * size { (low, high) } else { (low - 0.05 * size, high + 0.05 * size) }
}

/// Three significant digits.
fn significant(value: f64) -> f64 {
    format!("{value:.2e}").parse().unwrap_or(value)
}

/// A number without superfluous digits.
fn label(value: f64) -> String {
    // Multiples of a tick's stride carry rounding errors in the last digits.
    let value: f64 = format!("{value:.9e}").parse().unwrap_or(value);
    let size = value.abs();
    if size != 0.0 && !(1e-4..1e7).contains(&size) { format!("{value:e}") } else { format!("{value}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn style(log_scale: bool, smoothing: f64) -> Style {
        Style { title: "Stage 1".to_owned(), y_label: "loss".to_owned(), log_scale, smoothing }
    }

    fn curve(name: &str, values: &[f64]) -> Curve {
        let points = values.iter().enumerate().map(|(i, &value)| ((i + 1) as f64, value)).collect();
        Curve { name: name.to_owned(), points }
    }

    /// All numbers in the attributes of paths.
    fn coordinates(svg: &str) -> Vec<f64> {
        let paths = svg.split("d=\"").skip(1).map(|rest| rest.split('"').next().unwrap_or_default());
        let numbers = paths.flat_map(|path| path.split(|c: char| !(c.is_ascii_digit() || "-.".contains(c))));
        numbers.filter(|number| !number.is_empty()).map(|number| number.parse().expect("a number")).collect()
    }

    #[test]
    fn points_land_where_the_axes_say() {
        let svg = svg(&[curve("loss", &[0.0, 10.0, 5.0])], &style(false, 1.0));
        let y = |value: f64| BOTTOM + value / 10.4 * (TOP - BOTTOM);
        let middle = (LEFT + RIGHT) / 2.0;
        let path = format!("M{LEFT:.1} {:.1}L{middle:.1} {:.1}L{RIGHT:.1} {:.1}", y(0.0), y(10.0), y(5.0));
        assert!(svg.contains(&path), "{path} not in {svg}");
        assert!(svg.contains(">loss 5</text>"), "the legend has the last value");
    }

    #[test]
    fn a_log_axis_spaces_equal_factors_equally() {
        let axis = Axis { low: 0.01, high: 100.0, ends: (BOTTOM, TOP), log_scale: true };
        let places = [0.01, 0.1, 1.0, 10.0, 100.0].map(|v| axis.place(v));
        for pair in places.windows(2) {
            assert!((pair[0] - pair[1] - (BOTTOM - TOP) / 4.0).abs() < 1e-9);
        }
        assert_eq!(
            axis.ticks().iter().map(|t| label(*t)).collect::<Vec<_>>(),
            ["0.01", "0.1", "1", "10", "100"]
        );
        let narrow = Axis { low: 2.0, high: 4.0, ..axis };
        assert!(narrow.ticks().len() >= 4, "{:?}", narrow.ticks());
    }

    #[test]
    fn ticks_are_round_and_inside() {
        for (low, high) in [(0.0, 1.0), (1.0, 6000.0), (-3.0, 11.0), (0.123, 0.127), (1e-9, 3e-9), (5.0, 5e8)]
        {
            let ticks = Axis { low, high, ends: (0.0, 1.0), log_scale: false }.ticks();
            assert!((4..=8).contains(&ticks.len()), "{ticks:?}");
            assert!(ticks.iter().all(|t| (low..=high).contains(t) && label(*t).len() <= 9), "{ticks:?}");
        }
    }

    #[test]
    fn smoothing_keeps_a_constant_and_follows_a_step() {
        let constant = moving_average(&[vec![(1.0, 3.0), (2.0, 3.0)], vec![(9.0, 3.0)]], 50.0);
        assert!(constant.iter().flatten().all(|point| (point.1 - 3.0).abs() < 1e-12));
        let steps: Vec<_> = (0..200).map(|i| (f64::from(i), f64::from(u8::from(i >= 100)))).collect();
        let average = &moving_average(&[steps], 10.0)[0];
        assert!(average[99].1 == 0.0 && average[105].1 < 0.6 && average[199].1 > 0.99);
    }

    #[test]
    fn a_long_run_gives_a_small_picture() {
        let values: Vec<f64> = (0..200_000).map(|i| 5.0 + f64::from(i).sin()).collect();
        assert!(svg(&[curve("loss", &values)], &style(false, 100.0)).len() < 100_000);
    }

    #[test]
    fn strange_values_still_give_a_picture() {
        let cases: [&[f64]; 10] = [
            &[],
            &[1.0],
            &[2.0; 5],
            &[0.0; 5],
            &[f64::NAN, f64::INFINITY],
            &[1.0, f64::NAN, 2.0, 1e38, -1e38, f64::MAX, f64::MIN],
            &[-1.0, -2.0],
            &[1e-300, 1e300],
            &[1e-30],
            &[1e-38, 3e38],
        ];
        for values in cases {
            for log_scale in [false, true] {
                let svg = svg(&[curve("loss", values)], &style(log_scale, 3.0));
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{values:?}: {svg}");
                assert!(coordinates(&svg).iter().all(|c| c.abs() < 20_000.0), "{values:?}");
            }
        }
    }

    #[test]
    fn names_are_escaped() {
        let svg = svg(&[curve("a<b & \u{1}c", &[1.0, 2.0])], &style(false, 1.0));
        assert!(svg.contains("a&lt;b &amp; c"));
    }

    #[test]
    fn a_log_without_the_values_is_an_error() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (log, svg) = (dir.path().join("log.jsonl"), dir.path().join("loss.svg"));
        std::fs::write(&log, "{\"step\":1,\"time\":0,\"loss\":2}\n{\"step\":2,\"time\":0,\"loss\":1}\n")
            .expect("log");
        let error =
            plot_log(&log, &["itc", "itm"], &style(false, 1.0), &svg).expect_err("no such value").to_string();
        assert!(error.contains("log.jsonl") && error.contains("itc, itm"), "{error}");
        assert!(!svg.exists());
        plot_log(&log, &["loss", "itc"], &style(false, 1.0), &svg).expect("plot");
        assert!(std::fs::read_to_string(&svg).expect("svg").ends_with("</svg>\n"));
    }
}
