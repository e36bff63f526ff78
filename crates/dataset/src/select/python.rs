//! Python's `random` as far as HakuBooru's selection needs it: Mersenne Twister (Matsumoto and Nishimura 1998, MT19937),
//! seeded as CPython's `random.seed(int)` does (`Modules/_randommodule.c`), and `choices` (`Lib/random.py`).

const N: usize = 624;
const M: usize = 397;

/// Python's generator.
#[derive(Debug, Clone)]
pub struct PythonRandom {
    state: [u32; N],
    at: usize,
}

impl PythonRandom {
    /// As after `random.seed(seed)`.
    pub fn new(seed: u64) -> Self {
        let words = [seed as u32, (seed >> 32) as u32];
        Self::from_key(if words[1] == 0 { &words[..1] } else { &words })
    }

    /// `init_by_array`.
    fn from_key(key: &[u32]) -> Self {
        let mut s = [0u32; N];
        s[0] = 19_650_218;
        for i in 1..N {
            s[i] = 1_812_433_253u32.wrapping_mul(s[i - 1] ^ (s[i - 1] >> 30)).wrapping_add(i as u32);
        }
        let mut i = 1;
        let step = |s: &mut [u32; N], i: usize, factor: u32| s[i] ^ (s[i - 1] ^ (s[i - 1] >> 30)).wrapping_mul(factor);
        let next = |s: &mut [u32; N], i: usize| {
            if i + 1 < N {
                return i + 1;
            }
            s[0] = s[N - 1];
            1
        };
        for k in 0..N.max(key.len()) {
            let j = k % key.len();
            s[i] = step(&mut s, i, 1_664_525).wrapping_add(key[j]).wrapping_add(j as u32);
            i = next(&mut s, i);
        }
        for _ in 1..N {
            s[i] = step(&mut s, i, 1_566_083_941).wrapping_sub(i as u32);
            i = next(&mut s, i);
        }
        s[0] = 0x8000_0000;
        Self { state: s, at: N }
    }

    fn next_u32(&mut self) -> u32 {
        if self.at == N {
            for i in 0..N {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7FFF_FFFF);
                self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ if y & 1 == 1 { 0x9908_B0DF } else { 0 };
            }
            self.at = 0;
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9D2C_5680;
        y ^= (y << 15) & 0xEFC6_0000;
        y ^ (y >> 18)
    }

    /// `random.random()`: uniform in [0, 1), 53 bits.
    pub fn random(&mut self) -> f64 {
        let (a, b) = (self.next_u32() >> 5, self.next_u32() >> 6);
        (f64::from(a) * 67_108_864.0 + f64::from(b)) * (1.0 / 9_007_199_254_740_992.0)
    }

    /// The indices that `random.choices(population, k = k)` draws from `n` items, with replacement; none of nothing.
    pub fn choices(&mut self, n: usize, k: usize) -> Vec<usize> {
        if n == 0 {
            return Vec::new();
        }
        (0..k).map(|_| (self.random() * n as f64).floor() as usize).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// python3 -c "import random; random.seed(S); print([random.random() for _ in range(3)])", CPython 3.11.
    #[test]
    fn equals_python() {
        for (seed, expected) in [
            (1, [0.134_364_244_112_401_22, 0.847_433_736_937_232_7, 0.763_774_618_976_614]),
            (0, [0.844_421_851_525_048_1, 0.757_954_402_940_302_5, 0.420_571_580_830_845]),
            // More than 32 bits: a key of two words.
            (1 << 40 | 7, [0.613_703_777_993_651_1, 0.814_916_297_330_948_7, 0.945_011_508_759_287_3]),
        ] {
            let mut random = PythonRandom::new(seed);
            assert_eq!([random.random(), random.random(), random.random()], expected, "seed {seed}");
        }
    }
}
