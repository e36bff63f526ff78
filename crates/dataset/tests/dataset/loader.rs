//! Prefetching: order, bound, errors in place, clean stops.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use dataset::Prefetcher;

#[test]
fn order_does_not_depend_on_speed_or_threads() {
    for threads in [1, 2, 3, 8] {
        // Later items are quicker: whoever is first must still wait for its turn.
        let slow_first = |k: u64| {
            std::thread::sleep(Duration::from_micros(500 * (7 - k % 8)));
            k * k
        };
        let got: Vec<u64> = Prefetcher::new(5..45, threads, 6, slow_first).unwrap().collect();
        assert_eq!(got, (5..45).map(|k| k * k).collect::<Vec<_>>());
    }
    assert_eq!(Prefetcher::new(3..3, 2, 2, |k| k).unwrap().count(), 0);
}

#[test]
fn no_more_than_the_bound_is_prepared_ahead() {
    let prepared = Arc::new(AtomicUsize::new(0));
    let counter = prepared.clone();
    let mut items = Prefetcher::new(0..100, 2, 4, move |k| {
        counter.fetch_add(1, Ordering::SeqCst);
        k
    })
    .unwrap();
    assert_eq!(items.next(), Some(0));
    std::thread::sleep(Duration::from_millis(100));
    // One taken, four waiting, one in the hand of each of the two threads.
    assert!(prepared.load(Ordering::SeqCst) <= 7, "{}", prepared.load(Ordering::SeqCst));
    assert_eq!(items.position(), 1);
}

#[test]
fn errors_come_in_their_place() {
    let fails = |k: u64| if k == 3 { Err(format!("item {k}")) } else { Ok(k) };
    let got: Vec<_> = Prefetcher::new(0..6, 2, 2, fails).unwrap().collect();
    assert_eq!(got, [Ok(0), Ok(1), Ok(2), Err("item 3".into()), Ok(4), Ok(5)]);
}

#[test]
fn a_drop_stops_the_threads() {
    let prepared = Arc::new(AtomicUsize::new(0));
    let counter = prepared.clone();
    let mut items = Prefetcher::new(0..u64::MAX, 3, 3, move |_| counter.fetch_add(1, Ordering::SeqCst)).unwrap();
    items.next();
    drop(items);
    // The threads have ended: nothing else holds the closure, nor counts.
    assert_eq!(Arc::strong_count(&prepared), 1);
}

#[test]
#[should_panic(expected = "broken on purpose")]
fn a_panic_reaches_the_reader() {
    let items = Prefetcher::new(0..9, 2, 2, |k| if k == 4 { panic!("broken on purpose") } else { k }).unwrap();
    items.for_each(drop);
}
