//! Finding texts by picture and pictures by text: recall of similarity (ITC) alone and after re-ranking by matching
//! (ITM).
//!
//! ITC compares everything with everything by one dot product; ITM looks at a picture and a text together, far too
//! slow for all pairs, so it only re-orders what ITC put first:
//! [`Candidates::best`] → the model scores those pairs → [`rerank`].

use std::cmp::Ordering;

use rayon::prelude::*;

/// The share of queries (0 to 1) whose right answer is among the first 1, 5 and 10.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Recall {
    /// R@1.
    pub at_1: f64,
    /// R@5.
    pub at_5: f64,
    /// R@10.
    pub at_10: f64,
}

impl Recall {
    fn of(ranks: &[usize]) -> Self {
        let within = |k| ranks.iter().filter(|&&rank| rank < k).count() as f64 / ranks.len() as f64;
        Self { at_1: within(1), at_5: within(5), at_10: within(10) }
    }
}

/// Retrieval both ways.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct RetrievalScores {
    /// TR: a picture finds any of its texts. Pictures without a text are not asked for one.
    pub text: Recall,
    /// IR: a text finds its picture.
    pub image: Recall,
}

/// Recall from a full matrix of similarities.
///
/// An answer that ties with a wrong one (or is not a number) ranks behind it, so a model that gives everything the
/// same score finds nothing. Recall of no queries is not a number.
///
/// # Shapes
/// - `similarities`: `[n_images, n_texts]`, row-major
/// - `image_of_text`: `[n_texts]`, the picture each text belongs to
///
/// # Panics
/// When the lengths do not fit or a picture index is out of range.
#[must_use]
pub fn retrieval(similarities: &[f32], n_images: usize, image_of_text: &[usize]) -> RetrievalScores {
    let matrix = Matrix::new(similarities, n_images, image_of_text.len());
    check_pairs(n_images, image_of_text);
    let text_ranks =
        (0..n_images).into_par_iter().filter(|image| image_of_text.contains(image)).map(|image| {
            let scores: Vec<f32> = matrix.of_image(image).collect();
            rank(&scores, |text| image_of_text[text] == image)
        });
    let image_ranks = image_of_text.par_iter().enumerate().map(|(text, &right)| {
        let scores: Vec<f32> = matrix.of_text(text).collect();
        rank(&scores, |image| image == right)
    });
    RetrievalScores {
        text: Recall::of(&text_ranks.collect::<Vec<_>>()),
        image: Recall::of(&image_ranks.collect::<Vec<_>>()),
    }
}

/// For each query, what similarity found best, best first: the pairs that re-ranking has to score.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidates {
    /// `[n_images][k]` indices of texts.
    pub texts_of_image: Vec<Vec<usize>>,
    /// `[n_texts][k]` indices of pictures.
    pub images_of_text: Vec<Vec<usize>>,
}

impl Candidates {
    /// The `k` best (all, if there are fewer) for each picture and each text; of equals, the first.
    ///
    /// # Panics
    /// When `similarities` is not `[n_images, n_texts]`.
    #[must_use]
    pub fn best(similarities: &[f32], n_images: usize, n_texts: usize, k: usize) -> Self {
        let matrix = Matrix::new(similarities, n_images, n_texts);
        let best_of = |scores: Vec<f32>| {
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a])); // stable
            order.truncate(k);
            order
        };
        Self {
            texts_of_image: (0..n_images)
                .into_par_iter()
                .map(|i| best_of(matrix.of_image(i).collect()))
                .collect(),
            images_of_text: (0..n_texts)
                .into_par_iter()
                .map(|t| best_of(matrix.of_text(t).collect()))
                .collect(),
        }
    }
}

/// What orders the candidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rescoring {
    /// The ITM logit plus the ITC cosine, as LAVIS computes the published numbers.
    #[default]
    ItmPlusItc,
    /// The ITM logit alone, as the paper's text says (arXiv:2301.12597, section 4.4).
    Itm,
}

/// Recall after re-ranking. A right answer that is no candidate is behind all candidates.
///
/// # Shapes
/// - `similarities`, `image_of_text`: as for [`retrieval`], the similarity being the cosine without temperature
/// - `text_logits`: shaped as `candidates.texts_of_image`, the raw "match" logit of each pair
/// - `image_logits`: shaped as `candidates.images_of_text`
///
/// # Panics
/// When the shapes do not fit.
#[must_use]
pub fn rerank(
    similarities: &[f32],
    image_of_text: &[usize],
    candidates: &Candidates,
    text_logits: &[Vec<f32>],
    image_logits: &[Vec<f32>],
    rescoring: Rescoring,
) -> RetrievalScores {
    let (n_images, n_texts) = (candidates.texts_of_image.len(), image_of_text.len());
    let matrix = Matrix::new(similarities, n_images, n_texts);
    check_pairs(n_images, image_of_text);
    assert_eq!(candidates.images_of_text.len(), n_texts, "one list of candidates per text");
    let rescored = |logits: &[f32], cosines: &mut dyn Iterator<Item = f32>| -> Vec<f32> {
        match rescoring {
            Rescoring::ItmPlusItc => {
                logits.iter().zip(cosines).map(|(logit, cosine)| logit + cosine).collect()
            }
            Rescoring::Itm => logits.to_vec(),
        }
    };
    let text_ranks = rank_lists(&candidates.texts_of_image, text_logits, |image, found, logits| {
        image_of_text.contains(&image).then(|| {
            let scores = rescored(logits, &mut found.iter().map(|&text| matrix.at(image, text)));
            rank(&scores, |i| image_of_text[found[i]] == image)
        })
    });
    let image_ranks = rank_lists(&candidates.images_of_text, image_logits, |text, found, logits| {
        let scores = rescored(logits, &mut found.iter().map(|&image| matrix.at(image, text)));
        Some(rank(&scores, |i| found[i] == image_of_text[text]))
    });
    RetrievalScores { text: Recall::of(&text_ranks), image: Recall::of(&image_ranks) }
}

/// The ranks of all queries which `rank_one(query, candidates, logits)` gives one.
fn rank_lists(
    candidates: &[Vec<usize>],
    logits: &[Vec<f32>],
    rank_one: impl Fn(usize, &[usize], &[f32]) -> Option<usize>,
) -> Vec<usize> {
    assert_eq!(candidates.len(), logits.len(), "one list of logits per list of candidates");
    let lists = candidates.iter().zip(logits).enumerate();
    lists
        .filter_map(|(query, (candidates, logits))| {
            assert_eq!(candidates.len(), logits.len(), "one logit per candidate of query {query}");
            rank_one(query, candidates, logits)
        })
        .collect()
}

/// How many wrong answers are ahead of the best right one; `usize::MAX` when no answer is right.
fn rank(scores: &[f32], is_right: impl Fn(usize) -> bool) -> usize {
    let right = (0..scores.len()).filter(|&i| is_right(i)).map(|i| scores[i]);
    // `max` prefers a number to NaN.
    let Some(best) = right.reduce(f32::max) else { return usize::MAX };
    (0..scores.len())
        .filter(|&i| !is_right(i) && scores[i].partial_cmp(&best) != Some(Ordering::Less))
        .count()
}

fn check_pairs(n_images: usize, image_of_text: &[usize]) {
    assert!(
        image_of_text.iter().all(|&image| image < n_images),
        "a text belongs to a picture that is not there"
    );
}

/// A row-major `[n_images, n_texts]` view.
struct Matrix<'a> {
    values: &'a [f32],
    n_texts: usize,
}

impl<'a> Matrix<'a> {
    fn new(values: &'a [f32], n_images: usize, n_texts: usize) -> Self {
        assert_eq!(values.len(), n_images * n_texts, "similarities are [{n_images}, {n_texts}]");
        Self { values, n_texts }
    }

    fn at(&self, image: usize, text: usize) -> f32 {
        self.values[image * self.n_texts + text]
    }

    fn of_image(&self, image: usize) -> impl Iterator<Item = f32> {
        self.values[image * self.n_texts..][..self.n_texts].iter().copied()
    }

    fn of_text(&self, text: usize) -> impl Iterator<Item = f32> {
        self.values.iter().skip(text).step_by(self.n_texts).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recall(at_1: f64, at_5: f64, at_10: f64) -> Recall {
        Recall { at_1, at_5, at_10 }
    }

    /// A repeatable stand-in for noise, -1 to 1.
    fn noise(i: usize) -> f32 {
        (i as f32 * 12.9898).sin() * 43758.547 % 1.0
    }

    #[test]
    fn recall_counts_the_right_answers_among_the_first_k() {
        // Twenty pictures and texts; the right text of picture i has i wrong ones ahead of it.
        let n = 20;
        let mut similarities = vec![0.0; n * n];
        for image in 0..n {
            for (place, text) in (0..n).filter(|&t| t != image).enumerate() {
                similarities[image * n + text] = if place < image { 1.0 } else { -1.0 };
            }
        }
        let scores = retrieval(&similarities, n, &(0..n).collect::<Vec<_>>());
        assert_eq!(scores.text, recall(0.05, 0.25, 0.5));
    }

    #[test]
    fn any_of_several_captions_counts() {
        // Pictures 0 and 1 with two captions each, picture 2 with none.
        let image_of_text = [0, 0, 1, 1];
        #[rustfmt::skip]
        let similarities = [
            0.1, 0.9, 0.5, 0.2, // finds its second caption first
            0.8, 0.7, 0.6, 0.1, // two wrong ones ahead
            0.0, 0.0, 0.0, 0.95,
        ];
        let scores = retrieval(&similarities, 3, &image_of_text);
        assert_eq!(scores.text, recall(0.5, 1.0, 1.0));
        // Columns: text 0 → picture 1 is ahead; text 1 → right; text 2 → right; text 3 → 2 ahead.
        assert_eq!(scores.image, recall(0.5, 1.0, 1.0));
    }

    #[test]
    fn equal_or_broken_scores_find_nothing() {
        for value in [0.0, f32::NAN] {
            let scores = retrieval(&vec![value; 20 * 20], 20, &(0..20).collect::<Vec<_>>());
            assert_eq!((scores.text, scores.image), (Recall::default(), Recall::default()));
        }
    }

    /// The definition, by sorting: the place of the first right answer. `noise` has no ties.
    fn by_sorting(similarities: &[f32], n_images: usize, image_of_text: &[usize]) -> RetrievalScores {
        let n_texts = image_of_text.len();
        let place = |scores: Vec<f32>, is_right: &dyn Fn(usize) -> bool| {
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).expect("numbers"));
            order.into_iter().position(is_right).expect("a right answer")
        };
        let texts = (0..n_images)
            .map(|i| place(similarities[i * n_texts..][..n_texts].to_vec(), &|t| image_of_text[t] == i));
        let images = (0..n_texts).map(|t| {
            place((0..n_images).map(|i| similarities[i * n_texts + t]).collect(), &|i| image_of_text[t] == i)
        });
        RetrievalScores {
            text: Recall::of(&texts.collect::<Vec<_>>()),
            image: Recall::of(&images.collect::<Vec<_>>()),
        }
    }

    #[test]
    fn ranks_equal_sorting() {
        let (n_images, n_texts) = (30, 150);
        let similarities: Vec<f32> = (0..n_images * n_texts).map(noise).collect();
        let image_of_text: Vec<usize> = (0..n_texts).map(|t| t / 5).collect();
        let scores = retrieval(&similarities, n_images, &image_of_text);
        assert_eq!(scores, by_sorting(&similarities, n_images, &image_of_text));
        assert!(scores.text.at_10 > 0.0 && scores.text.at_1 < 1.0);
    }

    #[test]
    fn re_ranking_everything_equals_ranking_by_the_sum() {
        let (n_images, n_texts) = (12, 24);
        let similarities: Vec<f32> = (0..n_images * n_texts).map(noise).collect();
        let logits: Vec<f32> = (1000..1000 + n_images * n_texts).map(|i| 2.0 * noise(i)).collect();
        let image_of_text: Vec<usize> = (0..n_texts).map(|t| t % n_images).collect();
        let sums: Vec<f32> = similarities.iter().zip(&logits).map(|(s, l)| s + l).collect();

        let candidates = Candidates::best(&similarities, n_images, n_texts, 128);
        let logits_of = |lists: &[Vec<usize>], at: &dyn Fn(usize, usize) -> usize| -> Vec<Vec<f32>> {
            let one = |(query, list): (usize, &Vec<usize>)| {
                list.iter().map(|&found| logits[at(query, found)]).collect()
            };
            lists.iter().enumerate().map(one).collect()
        };
        let text_logits = logits_of(&candidates.texts_of_image, &|image, text| image * n_texts + text);
        let image_logits = logits_of(&candidates.images_of_text, &|text, image| image * n_texts + text);
        let rerank = |rescoring| {
            rerank(&similarities, &image_of_text, &candidates, &text_logits, &image_logits, rescoring)
        };
        assert_eq!(rerank(Rescoring::ItmPlusItc), retrieval(&sums, n_images, &image_of_text));
        assert_eq!(rerank(Rescoring::Itm), retrieval(&logits, n_images, &image_of_text));
        assert_ne!(rerank(Rescoring::Itm), rerank(Rescoring::ItmPlusItc));
    }

    #[test]
    fn a_right_answer_that_is_no_candidate_stays_unfound() {
        // ITC puts the right text of picture 0 last; whatever ITM thinks of the others, it is not found.
        let similarities = [0.1, 0.8, 0.9, 0.2, 0.9, 0.1, 0.1, 0.2, 0.9];
        let candidates = Candidates::best(&similarities, 3, 3, 2);
        assert_eq!(candidates.texts_of_image, [[2, 1], [1, 0], [2, 1]]);
        assert_eq!(candidates.images_of_text, [[1, 0], [1, 0], [0, 2]]);
        let text_logits = [vec![-5.0, -5.0], vec![1.0, 0.0], vec![1.0, 0.0]];
        let image_logits = [vec![0.0, 1.0], vec![1.0, 0.0], vec![2.0, 0.5]];
        let scores =
            rerank(&similarities, &[0, 1, 2], &candidates, &text_logits, &image_logits, Rescoring::Itm);
        assert_eq!(scores.text, recall(2.0 / 3.0, 2.0 / 3.0, 2.0 / 3.0));
        assert_eq!(scores.image, recall(2.0 / 3.0, 1.0, 1.0));
    }
}
