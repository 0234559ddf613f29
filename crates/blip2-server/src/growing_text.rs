//! The text of an answer while it grows: what of it can be shown already.

/// Cuts an answer at stop strings, which the library ends a text *behind*, and keeps back what may still change: blanks at
/// the end, and what may be the beginning of a stop string. So the pieces of a stream are the whole answer, cut up.
#[derive(Debug, Default)]
pub(crate) struct GrowingText {
    stop: Vec<String>,
    /// From the first character that is not blank.
    text: String,
    n_shown: usize,
}

impl GrowingText {
    pub(crate) fn new(stop: &[String]) -> Self {
        Self { stop: stop.to_vec(), ..Self::default() }
    }

    /// Adds characters; gives those that can be shown now.
    pub(crate) fn push(&mut self, piece: &str) -> &str {
        self.text.push_str(if self.text.is_empty() { piece.trim_start() } else { piece });
        let safe = match self.cut() {
            Some(cut) => cut,
            None => self.text.len() - self.n_unsure(),
        };
        self.show(self.text[..safe].trim_end().len())
    }

    /// Gives what is left, now that `whole` is the answer.
    pub(crate) fn finish(&mut self, whole: &str) -> &str {
        whole.trim_start().clone_into(&mut self.text);
        let end = self.cut().unwrap_or(self.text.len());
        self.show(self.text[..end].trim_end().len())
    }

    fn show(&mut self, end: usize) -> &str {
        let start = self.n_shown;
        self.n_shown = self.n_shown.max(end);
        self.text.get(start..end).unwrap_or_default()
    }

    /// Where the first stop string begins.
    fn cut(&self) -> Option<usize> {
        self.stop.iter().filter_map(|stop| self.text.find(stop.as_str())).min()
    }

    /// How many bytes at the end may be the beginning of a stop string.
    fn n_unsure(&self) -> usize {
        let is_end = |n: &usize, stop: &str| stop.is_char_boundary(*n) && self.text.ends_with(&stop[..*n]);
        let longest = |stop: &String| (1..stop.len()).rev().find(|n| is_end(n, stop));
        self.stop.iter().filter_map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown, piece by piece.
    fn shown(stop: &[&str], pieces: &[&str]) -> Vec<String> {
        let stop: Vec<String> = stop.iter().map(ToString::to_string).collect();
        let mut text = GrowingText::new(&stop);
        let mut shown: Vec<String> = pieces.iter().map(|piece| text.push(piece).to_owned()).collect();
        shown.push(text.finish(&pieces.concat()).to_owned());
        shown
    }

    #[test]
    fn blanks_are_shown_when_words_follow() {
        assert_eq!(shown(&[], &[" ", " a", " dog ", " runs", " \n"]), ["", "a", " dog", "  runs", "", ""]);
    }

    #[test]
    fn a_stop_string_and_its_beginnings_are_kept_back() {
        assert_eq!(shown(&["END"], &["aE", "N", "x E", "ND b"]), ["a", "", "ENx", "", ""]);
        assert_eq!(shown(&["END"], &["a E", "N"]), ["a", "", " EN"], "it was none after all");
        assert_eq!(shown(&["ab", "b"], &["xa", "b"]), ["x", "", ""]);
        assert_eq!(shown(&["é!"], &["caf", "é", " ok"]), ["caf", "", "é ok", ""]);
    }

    #[test]
    fn what_no_piece_told_comes_at_the_end() {
        let mut text = GrowingText::new(&["stop".to_owned()]);
        assert_eq!(text.finish("  with beams all at once stop and more"), "with beams all at once");
    }
}
