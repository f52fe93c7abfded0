from PIL import Image

from dpt_t2i.sampling.contact_sheet import CAPTION, MAX_COLUMNS, MAX_ROWS, THUMBNAIL, contact_sheet


def test_a_row_a_prompt_and_a_column_a_seed(tmp_path):
    rows = []
    for index, prompt in enumerate(("first", "zweiter “Satz” 漢")):
        for column, seed in enumerate((3, 10)):
            file = f"{index}_{seed}.png"
            Image.new("RGB", (32, 32), (index * 100, column * 100, 50)).save(tmp_path / file)
            rows.append({"file": file, "prompt_index": index, "prompt": prompt, "seed": seed})
    sheet = contact_sheet(tmp_path, [rows[place] for place in (1, 0, 3, 2)])  # columns go by seed
    assert sheet.size == (2 * THUMBNAIL, 2 * (THUMBNAIL + CAPTION))
    for index in (0, 1):
        for column in (0, 1):
            corner = (column * THUMBNAIL, index * (THUMBNAIL + CAPTION) + CAPTION)
            assert sheet.getpixel(corner) == (index * 100, column * 100, 50)
            assert sheet.getpixel((corner[0] + THUMBNAIL - 1, corner[1] + THUMBNAIL - 1)) == (
                index * 100,
                column * 100,
                50,
            )


def test_a_large_run_gives_a_sheet_of_bounded_size(tmp_path):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "one.png")
    rows = [
        {"file": "one.png", "prompt_index": index, "prompt": "p", "seed": seed}
        for index in range(40)
        for seed in range(20)
    ]
    sheet = contact_sheet(tmp_path, rows)
    assert sheet.size == (MAX_COLUMNS * THUMBNAIL, MAX_ROWS * (THUMBNAIL + CAPTION))
