from kdcompress.pipeline.quantization_aware import note_of_norms


def test_batch_norms_that_keep_their_statistics_are_told_of_in_one_line() -> None:
    assert note_of_norms(0, 5) == ""
    note = note_of_norms(2, 3)
    assert note.startswith("2 of 3 batch norms stay as they are in the file")
    assert "\n" not in note
