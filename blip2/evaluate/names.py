"""The names of what can be evaluated, and the files that each needs; nothing is imported for a command's help."""

from __future__ import annotations

# Task -> the files it needs under the data folder, each with a description. A folder's name ends with "/".
_VAL2014 = ("val2014/", "COCO's 2014 validation images, COCO_val2014_*.jpg")
TASK_FILES: dict[str, tuple[tuple[str, str], ...]] = {
    "coco": (("dataset_coco.json", "Karpathy's split (caption_datasets.zip)"), _VAL2014),
    "nocaps": (
        ("nocaps_val_4500_captions.json", "NoCaps' validation captions with their domains"),
        ("images/", "NoCaps' validation images, by the file_name the captions' file gives"),
    ),
    "flickr30k": (
        ("dataset_flickr30k.json", "Karpathy's split (caption_datasets.zip)"),
        ("flickr30k-images/", "Flickr30k's images, 1000092795.jpg and on"),
    ),
    "vqav2": (
        ("v2_OpenEnded_mscoco_val2014_questions.json", "VQAv2's validation questions"),
        ("v2_mscoco_val2014_annotations.json", "their answers, ten to a question"),
        _VAL2014,
    ),
    "okvqa": (
        ("OpenEnded_mscoco_val2014_questions.json", "OK-VQA's validation questions"),
        ("mscoco_val2014_annotations.json", "their answers, ten to a question"),
        _VAL2014,
    ),
    "gqa": (
        ("testdev_balanced_questions.json", "GQA's balanced test-dev questions"),
        ("images/", "GQA's images, by their ids: n161313.jpg"),
    ),
    "easyvqa": (
        ("easy_vqa/data/test/questions.json", "easy-VQA's test questions; `pip install easy-vqa` is enough"),
        ("easy_vqa/data/test/images/", "its images, 0.png and on"),
    ),
    "scenes": (
        (
            "scenes/scenes.json",
            "composed scenes with captions and questions, which default_model/make_scenes.py of the source writes",
        ),
        ("scenes/images/", "their images"),
    ),
    "photos": (
        (
            "photos.jsonl",
            'a row a photograph: {"image": "fruit/1.jpg", "names": ["apple", "fruit"]}; a caption with a name is right',
        ),
    ),
}
TASK_FILES["retrieval-coco"], TASK_FILES["retrieval-flickr30k"] = TASK_FILES["coco"], TASK_FILES["flickr30k"]
TASK_NAMES = (*TASK_FILES, "default", "captions", "questions")
