"""Writes posts as two kinds of parquet files have them, and beside each the same posts as JSON lines.

    posts-text.parquet   as dumps of danbooru's API: tags as text by class, dates as text, snappy
    posts-typed.parquet  as tables made with pandas or Arrow: lists, categories, points in time, floats for missing numbers, zstd

Made with Python 3.11, pyarrow 26.0.1:  python make_parquet.py
Read by ../dataset/parquet.rs.
"""

import datetime as dt
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
WORDS = "1girl solo long_hair o_o blue_eyes smile hat_(clothes) looking_at_viewer ^_^ café".split()


def post(i):
    words = lambda n, k: " ".join(WORDS[(i * k + j) % len(WORDS)] for j in range(n))
    return {
        "id": 100 + i * 3,
        "created_at": f"20{10 + i % 15}-0{1 + i % 9}-1{i % 10}T01:30:25.096-04:00",
        "md5": f"{i:032x}",
        "rating": "gsqe"[i % 4],
        "score": i * 7 % 50 - 10,
        "fav_count": i * i % 300,
        "is_deleted": i % 11 == 0,
        "is_banned": i % 13 == 0,
        "image_width": 600 + i,
        "image_height": 900 - i,
        "file_ext": ["jpg", "png", "webp", "mp4"][i % 4],
        "tag_string_general": words(i % 6, 3),
        "tag_string_artist": f"artist_{i % 7}" if i % 3 else "",
        "tag_string_character": "someone_(series)" if i % 4 == 1 else "",
        "tag_string_copyright": "series" if i % 4 == 1 else "original",
        "tag_string_meta": "highres commentary" if i % 2 else "",
    }


posts = [post(i) for i in range(60)]
write = lambda name, rows: (HERE / name).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
columns = lambda rows: {key: [row[key] for row in rows] for key in rows[0]}
table = pa.table(columns(posts))
table = table.set_column(0, "id", pa.array([p["id"] for p in posts], pa.int32()))
pq.write_table(table, HERE / "posts-text.parquet", row_group_size=25, compression="snappy")
write("posts-text.jsonl", posts)

# What is missing in one form is missing in the other; a date is that of UTC, since parquet keeps no other.
typed, lines = [], []
for i, p in enumerate(posts):
    score = None if i % 5 == 0 else p["score"]
    day = None if i % 9 == 4 else dt.datetime.fromisoformat(p["created_at"][:10])
    lists = {c: p[f"tag_string_{c}"].split() for c in ("general", "artist", "character", "copyright", "meta")}
    known = {k: p[k] for k in ("id", "rating", "is_deleted")} | {"width": p["image_width"], "height": p["image_height"]}
    typed.append(known | {"score": score, "created_at": day} | lists)
    lines.append(known | {"score": score, "created_at": day and day.date().isoformat()} | {f"tags_{c}": t for c, t in lists.items()})
c = columns(typed)
arrays = {
    "id": pa.array(c["id"], pa.uint64()),
    "rating": pa.array(c["rating"]).dictionary_encode(),
    "is_deleted": pa.array([int(v) for v in c["is_deleted"]], pa.int8()),
    "width": pa.array(c["width"], pa.uint16()),
    "height": pa.array(c["height"], pa.float32()),
    "score": pa.array([float("nan") if v is None else float(v) for v in c["score"]]),
    "created_at": pa.array(c["created_at"], pa.timestamp("ns")),
} | {k: pa.array(c[k], pa.large_list(pa.large_string())) for k in ("general", "artist", "character", "copyright", "meta")}
pq.write_table(pa.table(arrays), HERE / "posts-typed.parquet", compression="zstd", data_page_version="2.0")
write("posts-typed.jsonl", lines)
