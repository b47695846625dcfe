"""--data FOLDER: what is set, what contradicts, and that a run's config.yaml repeats it."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import default_argument_parser
from torchvision.models import resnet50

from commands import SMALL_CONFIG
from exports import NAMES, edit, write_export
from mabn_d2.checkpoint import differences, read_checkpoint
from mabn_d2.checkpoint.description import classes_of, config_of
from mabn_d2.commands.convert_weights import main as convert_weights
from mabn_d2.commands.train_net import run
from mabn_d2.data.coco_check import BadAnnotationError
from mabn_d2.data.labelled_folder import prepare_folder
from mabn_d2.engine import ConfigError, Trainer, check_data, read_config, setup_config, use_folder
from mabn_d2.engine.own_data import log_folder, warn_if_trained_on
from paths import ROOT


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Return a function that makes an export once; it is not to be changed."""
    root, made = tmp_path_factory.mktemp("exports"), {}

    def export(layout="coco", masks="polygons"):
        if (layout, masks) not in made:
            folder = root / f"{layout}_{masks}"
            made[layout, masks] = write_export(folder, layout, masks, (6, 2))
        return made[layout, masks]

    return export


def args(tmp_path, *arguments, config=SMALL_CONFIG, data=None):
    """Parse the command line of tools/train_net.py; `config` is a path or a text."""
    file = config
    if not isinstance(config, Path):
        file = tmp_path / "config.yaml"
        file.write_text(config)
    parser = default_argument_parser()
    parser.add_argument("--data")
    parsed = parser.parse_args(
        ["--config-file", str(file), "--num-gpus", "0", *map(str, arguments)]
    )
    parsed.data = data and str(data)
    if "OUTPUT_DIR" not in parsed.opts:
        parsed.opts += ["OUTPUT_DIR", str(tmp_path / "output")]
    return parsed


@pytest.mark.parametrize(
    "masks, wanted",
    [("boxes", (False, None)), ("polygons", (True, "polygon")), ("rle", (True, "bitmask"))],
)
def test_what_the_own_data_configs_get(exports, tmp_path, masks, wanted):
    folder = exports("coco", masks)
    for name in ("mask_rcnn", "faster_rcnn", "retinanet"):
        config = ROOT / f"configs/own_data_{name}_R50_FPN_mabn.yaml"
        cfg = setup_config(args(tmp_path, "SOLVER.EPOCHS", 8, config=config, data=folder))
        assert cfg.is_frozen() and str(folder) == cfg.DATASETS.FOLDER
        assert cfg.DATASETS.TRAIN[0] == f"coco_{masks}_train"
        assert cfg.DATASETS.TEST[0] == f"coco_{masks}_val"
        node = cfg.MODEL.RETINANET if name == "retinanet" else cfg.MODEL.ROI_HEADS
        assert node.NUM_CLASSES == 10
        if name != "mask_rcnn":
            assert not cfg.MODEL.MASK_ON
        else:
            assert wanted[0] == cfg.MODEL.MASK_ON
            assert wanted[1] == cfg.INPUT.MASK_FORMAT or not wanted[0]
        assert cfg.SOLVER.MAX_ITER == 8 * 6 // cfg.SOLVER.IMS_PER_BATCH


def test_more_than_the_flag_sets(exports, tmp_path):
    """DATASETS.FOLDER in the file or on the command line is the same; with a `~` and a share."""
    folder = exports("json")
    with_key = SMALL_CONFIG.replace("DATALOADER", f'DATASETS: {{FOLDER: "{folder}"}}\nDATALOADER')
    for arguments, kwargs in (
        ((), {"config": with_key}),
        (("DATASETS.FOLDER", folder), {}),
        (("DATASETS.VAL_SHARE", 0.5), {"data": folder}),
    ):
        cfg = setup_config(args(tmp_path, *arguments, **kwargs))
        assert str(folder) == cfg.DATASETS.FOLDER and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 10
    assert len(DatasetCatalog.get(cfg.DATASETS.TEST[0])) > 1


def test_masks_are_not_used_if_the_config_says_so(exports, tmp_path):
    cfg = setup_config(args(tmp_path, "MODEL.MASK_ON", False, data=exports()))
    assert not cfg.MODEL.MASK_ON
    cfg = setup_config(args(tmp_path, "INPUT.MASK_FORMAT", "bitmask", data=exports()))
    assert cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "bitmask"


@pytest.mark.parametrize(
    "masks, arguments, message",
    [
        (
            "polygons",
            ["MODEL.ROI_HEADS.NUM_CLASSES", 7],
            r"NUM_CLASSES is 7, but .* has 10 classes",
        ),
        ("polygons", ["DATASETS.TRAIN", "('coco_2017_train',)"], "DATASETS.TRAIN is .*coco_2017"),
        ("polygons", ["DATASETS.TEST", "('coco_2017_val',)"], "DATASETS.TEST is .*coco_2017"),
        ("polygons", ["DATASETS.TEST", "('coco_polygons_train',)"], "not trained on"),
        ("polygons", ["DATASETS.FOLDER", "elsewhere"], "--data is .* leave one out"),
        ("polygons", ["DATASETS.VAL_SHARE", 1.5], "VAL_SHARE is 1.5"),
        ("polygons", ["MODEL.META_ARCHITECTURE", "PanopticFPN"], "needs a label for every pixel"),
        ("boxes", ["MODEL.MASK_ON", True], r"MASK_ON is True, but (\d+) of \1 objects"),
        ("rle", ["INPUT.MASK_FORMAT", "polygon"], "MASK_FORMAT is 'polygon', but .* RLE"),
    ],
)
def test_contradictions_are_one_line(exports, tmp_path, masks, arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        setup_config(args(tmp_path, *arguments, data=exports("coco", masks)))
    assert "\n" not in str(error.value) and not (tmp_path / "output").exists()


def test_no_evaluation(exports, tmp_path):
    """DATASETS.TEST () is kept, so the images of val can be trained on too."""
    sets = ("DATASETS.TRAIN", "('coco_polygons_train','coco_polygons_val')")
    cfg = setup_config(args(tmp_path, *sets, "DATASETS.TEST", "()", data=exports()))
    assert cfg.DATASETS.TEST == () and len(cfg.DATASETS.TRAIN) == 2


def test_masks_for_a_model_of_boxes(exports, tmp_path):
    config = ROOT / "configs/own_data_retinanet_R50_FPN_mabn.yaml"
    with pytest.raises(ConfigError, match="RetinaNet has boxes only: leave the key out"):
        setup_config(args(tmp_path, "MODEL.MASK_ON", True, config=config, data=exports()))


@pytest.mark.parametrize(
    "line, message",
    [
        ("  ROI_HEADS: {NUM_CLASSES: 7}", "NUM_CLASSES is 7"),
        ("  MASK_ON: True", "MASK_ON is True"),
    ],
)
def test_contradictions_in_the_file(exports, tmp_path, line, message):
    """A key that the file itself has counts as given, one of its base does not."""
    config = SMALL_CONFIG.replace("MODEL:\n", f"MODEL:\n{line}\n")
    with pytest.raises(ConfigError, match=message):
        setup_config(args(tmp_path, config=config, data=exports("coco", "boxes")))


def test_some_objects_without_a_mask(exports, tmp_path, caplog):
    folder = shutil.copytree(exports(), tmp_path / "some")
    edit(
        folder / "annotations/instances_train2017.json",
        lambda c: c["annotations"][0].update(segmentation=[]),
    )
    cfg = setup_config(args(tmp_path, data=folder))
    assert not cfg.MODEL.MASK_ON
    caplog.set_level("INFO", "detectron2")
    log_folder(cfg)
    assert "1 of" in caplog.text and "objects have no mask" in caplog.text
    with pytest.raises(ConfigError, match="1 of"):
        setup_config(args(tmp_path, "MODEL.MASK_ON", True, data=folder))


def test_table(exports, tmp_path, caplog):
    cfg = setup_config(args(tmp_path, data=exports("label_studio", "boxes")))
    caplog.set_level("INFO", "detectron2")
    log_folder(cfg)
    text = caplog.text
    for part in ("Label Studio, 10 classes", "boxes without a mask", "fünf", "held out", "small",
                 "set: DATASETS.TRAIN ('label_studio_boxes_train',)"):  # fmt: skip
        assert part in text, text


def values(cfg):
    """Return a config's values as YAML has them: without tuples."""
    return yaml.safe_load(cfg.dump())


def test_run_is_repeated_by_its_config(exports, tmp_path):
    """The config.yaml of a run needs no flag; its checkpoint holds config and classes."""
    folder = exports("json")
    cfg = setup_config(args(tmp_path, data=folder))
    trainer = Trainer(cfg)
    again = setup_config(args(tmp_path, config=cfg.dump()))
    assert values(again) == values(cfg)
    trainer.checkpointer.save("model_final")

    checkpoint = read_checkpoint(tmp_path / "output/model_final.pth")
    assert values(config_of(checkpoint)) == values(cfg)
    assert [c["name"] for c in classes_of(checkpoint)] == NAMES
    assert [c["id"] for c in classes_of(checkpoint)] == list(range(1, 11))


def test_check_and_run_read_the_folder_once(exports, tmp_path, monkeypatch):
    calls = []

    def counted(*request):
        calls.append(request)
        return prepare_folder(*request)

    monkeypatch.setattr("mabn_d2.engine.own_data.prepare_folder", counted)
    parsed = args(tmp_path, data=exports("json"))
    assert values(setup_config(parsed, alone=True)) == values(setup_config(parsed))
    assert len(calls) == 1
    setup_config(parsed)  # it may have changed since
    setup_config(args(tmp_path, data=exports()), alone=True)
    assert str(exports("json")) == setup_config(parsed).DATASETS.FOLDER
    assert len(calls) == 4


@pytest.fixture
def trained(exports, tmp_path):
    """A checkpoint of a model that was trained on the folder "json"."""
    cfg = setup_config(args(tmp_path, data=exports("json")))
    trainer = Trainer(cfg)
    trainer.checkpointer.save("model_final")
    return tmp_path / "output" / "model_final.pth"


def evaluated(tmp_path, weights, folder, *more):
    cfg = setup_config(args(tmp_path, "--eval-only", "MODEL.WEIGHTS", weights, *more, data=folder))
    return cfg, DatasetCatalog.get(cfg.DATASETS.TEST[0])


def test_evaluation_on_the_folder_of_the_training(exports, trained, tmp_path, caplog):
    """It is of the images that were held out, wherever the folder is now; of another folder, of all."""
    training = setup_config(args(tmp_path, "OUTPUT_DIR", tmp_path / "new", data=exports("json")))
    held_out = DatasetCatalog.get(training.DATASETS.TEST[0])
    ids = [r["image_id"] for r in held_out]
    assert evaluated(tmp_path, trained, exports("json"))[1] == held_out
    copy = shutil.copytree(exports("json"), tmp_path / "moved" / "json_polygons")
    for same in (exports("json") / "labels.json", copy, copy / "labels.json"):
        assert [r["image_id"] for r in evaluated(tmp_path, trained, same)[1]] == ids, same
    # With another image it is another folder, unless DATASETS.TEST asks for what was held out.
    edit(copy / "labels.json", lambda c: c["images"][0].update(file_name="new.jpg"))
    (copy / "0.jpg").rename(copy / "new.jpg")
    cfg, records = evaluated(tmp_path, trained, copy)
    assert len(records) == 8
    warn_if_trained_on(cfg, read_checkpoint(trained))
    assert f"trained on images of {exports('json')}" in caplog.text
    _, records = evaluated(tmp_path, trained, copy, "DATASETS.TEST", f"('{names_val(copy)}',)")
    assert {*ids, 1} >= {r["image_id"] for r in records}


def test_share_of_the_training_is_kept(exports, tmp_path):
    """Another one would evaluate, or stop to train on, other images."""
    folder = exports("json")
    half = ("DATASETS.VAL_SHARE", 0.6)
    trainer = Trainer(setup_config(args(tmp_path, *half, data=folder)))
    trainer.checkpointer.save("model_final")
    held_out = DatasetCatalog.get(trainer.cfg.DATASETS.TEST[0])
    assert len(held_out) > 2
    weights = tmp_path / "output/model_final.pth"
    assert evaluated(tmp_path, weights, folder)[1] == held_out
    cfg = setup_config(args(tmp_path, "--resume", data=folder))
    assert DatasetCatalog.get(cfg.DATASETS.TEST[0]) == held_out
    assert evaluated(tmp_path, weights, folder, *half)[1] == held_out
    with pytest.raises(ConfigError, match=r"VAL_SHARE is 0.3, but .* was trained with 0.6"):
        setup_config(args(tmp_path, "--resume", "DATASETS.VAL_SHARE", 0.3, data=folder))
    moved = shutil.copytree(folder, tmp_path / "moved" / folder.name)
    for flags in (["--resume"], ["--eval-only", "MODEL.WEIGHTS", weights]):
        cfg = setup_config(args(tmp_path, *flags, data=moved))
        assert len(DatasetCatalog.get(cfg.DATASETS.TEST[0])) == len(held_out)


@pytest.mark.parametrize("train", [False, True])
def test_settings_that_weights_do_not_show(exports, trained, tmp_path, caplog, train):
    """The config in a checkpoint is compared with that of a run that starts from its weights."""
    options = [
        "MODEL.WEIGHTS", trained, "INPUT.FORMAT", "RGB", "INPUT.MIN_SIZE_TEST", 64,
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.5,1.0,3.0]]", "TEST.BEST_METRIC", "''",
    ]  # fmt: skip
    if train:
        options += ["SOLVER.MAX_ITER", 1, "OUTPUT_DIR", tmp_path / "tuned"]
        cfg = setup_config(args(tmp_path, *options, data=exports("json")))
        Trainer(cfg).resume_or_load(resume=False)
    else:
        run(args(tmp_path, "--eval-only", *options, data=exports("json")))
    warned = [r.getMessage() for r in caplog.records if "were trained with" in r.getMessage()]
    keys = ["INPUT.FORMAT is RGB", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS is [[0.5, 1.0, 3.0]]"]
    keys += [] if train else ["INPUT.MIN_SIZE_TEST is 64"]
    assert [line.partition(", the weights")[0] for line in warned] == keys


def test_evaluation_with_the_config_of_the_run(exports, trained, tmp_path, caplog):
    """The command of docs/custom-data.md: config.yaml needs no other key, and nothing differs."""
    config = read_checkpoint(trained)["config"]
    results = run(args(tmp_path, "--eval-only", "MODEL.WEIGHTS", trained, config=config))
    assert results.keys() == {"bbox", "segm"}
    assert "were trained with" not in caplog.text
    for masks in ("boxes", "rle"):
        other = exports("coco", masks)
        cfg = setup_config(
            args(tmp_path, "--eval-only", "MODEL.WEIGHTS", trained, config=config, data=other)
        )
        assert cfg.MODEL.MASK_ON is (masks == "rle")


def names_val(folder):
    from mabn_d2.data.labelled_folder.register import dataset_base

    return f"{dataset_base(folder)}_val"


def test_evaluation_orders_classes_as_the_checkpoint_does(exports, trained, tmp_path):
    folder = shutil.copytree(exports("json"), tmp_path / "other")
    content = json.loads((folder / "labels.json").read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    expected = [names[a["category_id"]] for a in content["annotations"]]
    used = sorted({a["category_id"] for a in content["annotations"]})
    content["categories"] = [{"id": 50 - id, "name": names[id]} for id in used]
    for annotation in content["annotations"]:
        annotation["category_id"] = 50 - annotation["category_id"]
    (folder / "labels.json").write_text(json.dumps(content))
    cfg, records = evaluated(tmp_path, trained, folder, "DATASETS.TEST", "('other_all',)")
    assert MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes == NAMES
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 10
    found = [NAMES[a["category_id"]] for r in records for a in r["annotations"]]
    assert found == expected
    edit(folder / "labels.json", lambda c: c["categories"][0].update(name="kreis"))
    with pytest.raises(BadAnnotationError, match="'kreis', which the checkpoint does not know"):
        evaluated(tmp_path, trained, folder)


@pytest.mark.parametrize("masks, other", [("polygons", "boxes"), ("boxes", "rle")])
def test_evaluation_where_only_one_has_masks(exports, tmp_path, masks, other):
    """The model or the folder: boxes are evaluated."""
    trainer = Trainer(setup_config(args(tmp_path, data=exports("coco", masks))))
    trainer.checkpointer.save("model_final")
    weights = trainer.cfg.OUTPUT_DIR + "/model_final.pth"
    results = run(
        args(tmp_path, "--eval-only", "MODEL.WEIGHTS", weights, data=exports("coco", other))
    )
    assert results.keys() == {"bbox"}


def test_resumed_run_keeps_its_classes(exports, trained, tmp_path):
    folder = shutil.copytree(exports("json"), tmp_path / "grown")
    edit(folder / "labels.json", lambda c: c["categories"].reverse())
    parsed = args(tmp_path, "--resume", data=folder)
    cfg = setup_config(parsed)
    assert MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes == NAMES
    edit(folder / "labels.json", lambda c: c["categories"][3].update(name="neu"))
    with pytest.raises(BadAnnotationError, match="'neu'.* new run .* MODEL.WEIGHTS"):
        setup_config(parsed)


def test_new_run_orders_classes_as_its_weights_do(exports, trained, tmp_path, caplog):
    """Each head goes on as that of its class; other names are named."""
    folder = shutil.copytree(exports("json"), tmp_path / "reversed")

    def reverse(content):
        for entry in content["categories"]:
            entry["id"] = 11 - entry["id"]
        for entry in content["annotations"]:
            entry["category_id"] = 11 - entry["category_id"]

    edit(folder / "labels.json", reverse)
    before = DatasetCatalog.get(setup_config(args(tmp_path, "OUTPUT_DIR", tmp_path / "a",
                                                  data=exports("json"))).DATASETS.TRAIN[0])  # fmt: skip
    options = ("MODEL.WEIGHTS", trained, "OUTPUT_DIR", tmp_path / "tuned")
    cfg = setup_config(args(tmp_path, *options, data=folder))
    assert MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes == NAMES
    classes = [
        [[a["category_id"] for a in r["annotations"]] for r in records]
        for records in (before, DatasetCatalog.get(cfg.DATASETS.TRAIN[0]))
    ]
    assert classes[0] == classes[1]
    Trainer(cfg).resume_or_load(resume=False)
    assert "were trained with the" not in caplog.text

    edit(folder / "labels.json", lambda c: c["categories"][0].update(name="neuf"))
    Trainer(setup_config(args(tmp_path, *options, data=folder))).resume_or_load(resume=False)
    assert "has the 10 classes (neun, acht, " in caplog.text
    assert "trained with the 10 classes (null, eins" in caplog.text
    assert "the class at its place" in caplog.text
    edit(folder / "labels.json", lambda c: c["categories"].append({"id": 20, "name": "more"}))
    Trainer(setup_config(args(tmp_path, *options, data=folder))).resume_or_load(resume=False)
    assert "has the 11 classes" in caplog.text and "starts anew" in caplog.text


def test_evaluation_of_a_registered_set_of_other_classes(exports, trained, tmp_path, caplog):
    folder = shutil.copytree(exports("coco"), tmp_path / "coco")
    file = folder / "annotations/instances_val2017.json"
    edit(file, lambda c: [entry.update(id=11 - entry["id"]) for entry in c["categories"]])
    edit(file, lambda c: [a.update(category_id=11 - a["category_id"]) for a in c["annotations"]])
    register_coco_instances("val_of_other_classes", {}, str(file), str(folder / "val2017"))
    try:
        config = SMALL_CONFIG + 'DATASETS: {TRAIN: [], TEST: ["val_of_other_classes"]}'
        run(args(tmp_path, "--eval-only", "MODEL.WEIGHTS", trained, config=config))
    finally:
        DatasetCatalog.remove("val_of_other_classes")
        MetadataCatalog.remove("val_of_other_classes")
    assert "val_of_other_classes has the 10 classes (neun, acht, " in caplog.text


def test_torchvision_weights_as_the_docs_say(exports, tmp_path):
    """The lines in docs/weights.md: the weights fit, and no recorded key differs."""
    torch.save(resnet50().state_dict(), tmp_path / "R50.pth")
    weights = tmp_path / "weights" / "R50.pth"
    convert_weights(["imagenet", str(tmp_path / "R50.pth"), str(weights)])
    text = (ROOT / "docs/weights.md").read_text(encoding="utf-8")
    keys = re.search(r"MODEL.WEIGHTS weights/R50-torchvision.pth(.*?)\n\n", text, re.DOTALL)[1]
    keys = shlex.split(keys.replace("\\\n", ""))
    keys += ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64]
    keys += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 256, "MODEL.WEIGHTS", weights]
    cfg = setup_config(args(tmp_path, *keys, data=exports("json")))
    assert differences(read_checkpoint(weights)["mabn_d2"], cfg) == []


def test_trainer_reads_the_folder_itself(exports, digits_cfg):
    """In a script that only sets the key, or that takes the config of a run of another process."""
    digits_cfg.DATASETS.FOLDER = str(exports("cvat", "rle"))
    trainer = Trainer(digits_cfg)
    assert trainer.cfg.DATASETS.TRAIN == ("cvat_rle_train",)
    assert len(trainer.data_loader.dataset) < 8
    for name in (*trainer.cfg.DATASETS.TRAIN, *trainer.cfg.DATASETS.TEST):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    again = Trainer(config_of({"config": trainer.cfg.dump()}))
    assert values(again.cfg) == values(trainer.cfg)
    digits_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 7
    with pytest.raises(ConfigError, match="NUM_CLASSES is 7"):
        Trainer(digits_cfg)


@pytest.mark.parametrize("annotation", [0, -1])
def test_faults_name_the_file_of_the_user(exports, tmp_path, annotation):
    """Not the copy that Detectron2 reads; a fault of what is held out too."""
    folder = shutil.copytree(exports("json"), tmp_path / "faulty")
    edit(folder / "labels.json", lambda c: c["annotations"][annotation].update(bbox=[1, 2, -3, 4]))
    cfg = setup_config(args(tmp_path, data=folder))
    with pytest.raises(BadAnnotationError, match=f"^{folder}/labels.json: annotation"):
        check_data(cfg)


def test_script_of_ones_own(exports, tmp_path, monkeypatch, caplog):
    """The lines in docs/custom-data.md, with a smaller model; the config is found in any folder."""
    monkeypatch.chdir(tmp_path)
    own = read_config("configs/own_data_mask_rcnn_R50_FPN_mabn.yaml")
    assert own.SOLVER.EPOCHS == 60
    (tmp_path / "config.yaml").write_text(SMALL_CONFIG)
    cfg = read_config(
        str(tmp_path / "config.yaml"),
        ["DATASETS.FOLDER", str(exports("cvat", "rle")), "OUTPUT_DIR", str(tmp_path / "output"),
         "MODEL.DEVICE", "cpu"],
    )  # fmt: skip
    folder = use_folder(cfg)
    assert folder.class_names == NAMES and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 10
    if not torch.cuda.is_available():
        on_gpu = cfg.clone()
        on_gpu.MODEL.DEVICE = "cuda"
        with pytest.raises(ConfigError, match="MODEL.DEVICE is 'cuda', but .*MODEL.DEVICE \"cpu\""):
            Trainer(on_gpu)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    assert caplog.text.count("the run starts from random weights") == 1
    trainer.train()
    assert trainer._last_eval_results["bbox"]
