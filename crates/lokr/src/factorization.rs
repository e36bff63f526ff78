//! How a layer's width is split into the two sides of the Kronecker product. Exactly LyCORIS's rule (lycoris/functional/general.py
//! `factorization`), because the split decides the shapes in the file. What is done with the split is left to `shape.rs`.

/// Splits `dim` into `(m, n)` with `m * n = dim` and `m <= n`.
///
/// A positive `factor` that divides `dim` is one of the two, whichever side that makes it. Otherwise it is a cap: `m` is
/// the largest divisor of `dim` that is at most `factor` and at most the square root of `dim`. A negative factor (-1 by
/// custom) means no cap. A `dim` of 0 gives `(0, 0)`; a `factor` of 0 gives `(1, dim)`.
pub fn factorization(dim: usize, factor: i64) -> (usize, usize) {
    if dim == 0 {
        return (0, 0);
    }
    let cap = usize::try_from(factor).unwrap_or(dim);
    if factor > 0 && dim.is_multiple_of(cap) {
        let other = dim / cap;
        return (cap.min(other), cap.max(other));
    }
    let mut m = cap.clamp(1, dim.isqrt());
    while !dim.is_multiple_of(m) {
        m -= 1;
    }
    (m, dim / m)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::golden;

    #[test]
    fn equals_lycoris_on_every_recorded_pair() {
        let table = golden::json("lokr.json")["factorization"].clone();
        let mut checked = 0;
        for (factor, row) in table.as_object().expect("an object") {
            for (dim, pair) in row.as_object().expect("an object") {
                let (dim, factor) = (dim.parse().expect("a number"), factor.parse().expect("a number"));
                let want = (pair[0].as_u64().expect("m") as usize, pair[1].as_u64().expect("n") as usize);
                assert_eq!(factorization(dim, factor), want, "dim {dim}, factor {factor}");
                checked += 1;
            }
        }
        assert!(checked > 50, "only {checked} pairs in the table");
    }

    /// The loop as LyCORIS writes it, step by step, against the closed form.
    fn stepwise(dim: usize, factor: i64) -> (usize, usize) {
        if factor > 0 && dim as i64 % factor == 0 {
            let (m, n) = (factor as usize, dim / factor as usize);
            return (m.min(n), m.max(n));
        }
        let factor = if factor < 0 { dim as i64 } else { factor };
        let (mut m, mut n, length) = (1, dim, dim + 1);
        while m < n {
            let mut next = m + 1;
            while !dim.is_multiple_of(next) {
                next += 1;
            }
            let other = dim / next;
            if next + other > length || next as i64 > factor {
                break;
            }
            (m, n) = (next, other);
        }
        (m.min(n), m.max(n))
    }

    #[test]
    fn closed_form_equals_the_loop() {
        for dim in 2..700 {
            for factor in [-7, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 27, 64, 100, 640] {
                assert_eq!(factorization(dim, factor), stepwise(dim, factor), "dim {dim}, factor {factor}");
            }
        }
        assert_eq!(factorization(1, -1), (1, 1));
        assert_eq!(factorization(0, 4), (0, 0));
    }
}
