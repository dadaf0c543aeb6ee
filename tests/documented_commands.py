"""How test_commands.py runs each command of README and docs: as it stands, with options appended that make it small,
or, where that cannot be, not, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools import download

PATCHES = "data/MSRS_train_imgsize_128_stride_200.h5"  # where train.py looks for patches of its own accord


@dataclass(frozen=True)
class How:
    """How a command is run.

    Attributes:
        extra: options appended; those that were given already are overridden.
        there: file that must be there -> stand-in of the world that it is copied from.
        makes: what must be there afterwards, and is not before.
        says: what must be in its output.
        before: the command is run with these options first, and stops with exit code 75.
        not_run: the reason why only its options are checked.
    """

    extra: str = ""
    there: tuple[tuple[str, str], ...] = ()
    makes: tuple[str, ...] = ()
    says: str = ""
    before: str = ""
    not_run: str = ""


CUT = "--patch-size 24 --stride 24 --holdout 2 --holdout-size 41"
SHORT = "--epoch-batches 1 --batch-size 2 --crop 16 --precision float32"
STAGES = f"{SHORT} --stage1-epochs 1 --stage2-epochs 1"
SECOND_STAGE = f"{SHORT} --stage2-epochs 1"  # where stage one has no epochs in the command
IVF_RUN = ("runs/cddfuse_ivf/CDDFuse_IVF.pth", "runs/cddfuse_ivf/log.jsonl", "runs/cddfuse_ivf/panels")
MIF_RUN = ("runs/cddfuse_mif/CDDFuse_MIF.pth",)
RESULT = ("test_result/CDDFuse_IVF/TNO/metrics.json", "test_result/CDDFuse_IVF/RoadScene/1.png")
PUBLISHED = tuple((f"models/published/{name}", f"models/{name}") for name in download.BLOBS)
TRACES = "takes minutes; tests/test_export.py runs it"
SERVES = "until it is ended; tests/test_app.py runs it"
PROCESSES = "several processes or machines; tests/test_distributed.py starts two of them"
MSRS, IVF, MIF = (("data/MSRS.h5", PATCHES),), (("data/IVF.h5", PATCHES),), (("data/MIF.h5", PATCHES),)
COLOUR = (("data/colour.h5", "stand-ins/colour.h5"),)


def weights(name: str, stand_in: str) -> tuple[tuple[str, str], ...]:
    return ((name, f"stand-ins/{stand_in}.pth"),)


def stage2(patches: str, makes: tuple[str, ...]) -> How:
    """A training without stage one, on a patch file in data/."""
    return How(SECOND_STAGE, ((f"data/{patches}.h5", PATCHES),), makes)


COMMANDS = {
    "pip install -r requirements.txt": How(not_run="needs network"),
    "pip install -r requirements-dev.txt": How(not_run="needs network"),
    "python -m pytest": How(not_run="it is what runs this test"),
    "python -m tools.doctor": How(says="nothing to fix"),
    "python -m tools.doctor --data path/to/test_img": How(says="path/to/test_img/TNO: 4 of 4 files as published"),
    "python -m tools.doctor --weights path/to/published.pth": How(says="path/to/published.pth: 158 keys fit CDDFuse"),
    "python -m tools.download --list": How(says="models/published/CDDFuse_IVF.pth"),
    "python -m tools.download all --base-url https://mirror.example/MMIF-CDDFuse": How(
        "--data fetched", makes=("models/published/CDDFuse_MIF.pth", "fetched/MRI_SPECT/SPECT/1.png")
    ),
    "python -m tools.download weights TNO RoadScene": How(
        "--data fetched", makes=("models/published/CDDFuse_MIF.pth", "fetched/RoadScene/ir/1.png")
    ),
    "python -m tools.download weights TNO RoadScene MRI_CT MRI_PET MRI_SPECT": How(
        "--data fetched", makes=("fetched/MRI_SPECT/MRI/1.png",)
    ),
    "python -m tools.export": How(not_run=TRACES),
    "python -m tools.export --system mlfuse --weights model_fuse.pth": How(not_run=TRACES),
    "python -m tools.export --task mif --formats onnx --no-stretch": How(not_run=TRACES),
    "python -m tools.halve runs/fsidfusion/FSIDFusion_IVF.pth FSIDFusion.pth --system fsidfusion": How(
        there=weights("runs/fsidfusion/FSIDFusion_IVF.pth", "fsidfusion"), makes=("FSIDFusion.pth",)
    ),
    "python -m tools.plot_training runs/cddfuse_ivf": How(
        there=(("runs/cddfuse_ivf/log.jsonl", "models/logs/ivf_2.jsonl"),), makes=("runs/cddfuse_ivf/curves.png",)
    ),
    "python -m tools.plot_training models/logs/ivf_1.jsonl models/logs/ivf_2.jsonl models/logs/ivf_3.jsonl "
    "models/logs/ivf_4.jsonl models/logs/ivf_5.jsonl models/logs/ivf_6.jsonl "
    "models/logs/ivf_7.jsonl models/logs/ivf_8.jsonl models/logs/ivf_9.jsonl "
    "models/logs/ivf_10.jsonl --out docs/training_ivf.png": How(makes=("docs/training_ivf.png",), says="mean gain"),
    "python -m tools.plot_training models/logs/mif_1.jsonl models/logs/mif_2.jsonl models/logs/mif_3.jsonl "
    "models/logs/mif_4.jsonl models/logs/mif_5.jsonl models/logs/mif_6.jsonl "
    "models/logs/mif_7.jsonl --last-hours 3 --out docs/training_mif.png": How(
        makes=("docs/training_mif.png",), says="mean gain"
    ),
    "OMP_NUM_THREADS=1 python -m benchmarks.recipes --data data/IVF_128.h5 --steps 300 "
    '--recipes "ours --warmup-steps 30 --ema 0.98 --gradient-images both"': How(
        not_run="takes minutes; tests/test_recipes.py runs it"
    ),
    "python -m tools.make_panel": How(makes=("docs/samples.png",)),
    "python app.py": How(not_run=SERVES),
    "python app.py --host 0.0.0.0 --max-memory 4GB": How(not_run=SERVES),
    "python app.py --weights mine.pth model_fuse.pth": How(not_run=SERVES),
    "python dataprocessing.py --data MRI_CT MRI_PET MRI_SPECT --out data/MIF.h5": How(CUT, makes=("data/MIF.h5",)),
    "python dataprocessing.py --data MSRS_train --holdout 20 --out data/MSRS.h5": How(CUT, makes=("data/MSRS.h5",)),
    "python dataprocessing.py --data MSRS_train --saliency --out data/saliency.h5": How(
        CUT, makes=("data/saliency.h5",)
    ),
    "python dataprocessing.py --data my_pairs --colour --holdout 10 --out data/colour.h5": How(
        CUT, makes=("data/colour.h5",)
    ),
    "python dataprocessing.py --data my_pairs --holdout 10 --out data/mine.h5": How(CUT, makes=("data/mine.h5",)),
    "python dataprocessing.py --data my_scans --patch-size 128 --stride 128 --holdout 10 --out data/scans.h5": How(
        CUT, makes=("data/scans.h5",)
    ),
    "python dataprocessing.py --data train/MRI_CT train/MRI_CT train/MRI_PET train/MRI_SPECT "
    "--patch-size 256 --stride 256 --holdout 60 --out data/MIF_ct2.h5": How(CUT, makes=("data/MIF_ct2.h5",)),
    "python dataprocessing.py --data train/MRI_CT train/MRI_CT train/MRI_CT train/MRI_PET train/MRI_SPECT "
    "--patch-size 256 --stride 256 --holdout 60 --out data/MIF_ct3.h5": How(CUT, makes=("data/MIF_ct3.h5",)),
    "python dataprocessing.py --data train/MRI_CT train/MRI_PET train/MRI_SPECT --patch-size 256 --stride 256 "
    "--holdout 60 --out data/MIF_h.h5": How(CUT, makes=("data/MIF_h.h5",)),
    "python dataprocessing.py --data train/MRI_CT train/MRI_PET train/MRI_SPECT --patch-size 256 --stride 256 "
    "--out data/MIF.h5": How(CUT, makes=("data/MIF.h5",)),
    "python dataprocessing.py --data train/MSRS train/RoadScene --patch-size 160 --stride 160 --holdout 30 "
    "--out data/IVF_h.h5": How(CUT, makes=("data/IVF_h.h5",)),
    "python dataprocessing.py --data train/MSRS train/RoadScene --patch-size 256 --stride 192 --holdout 30 "
    "--out data/IVF_256.h5": How(CUT, makes=("data/IVF_256.h5",)),
    "python dataprocessing.py --data train/MSRS train/RoadScene --patch-size 160 --stride 160 --out data/IVF.h5": How(
        CUT, makes=("data/IVF.h5",)
    ),
    "python dataprocessing.py --data train/MSRS train/RoadScene train/MRI_CT train/MRI_PET train/MRI_SPECT "
    "--patch-size 160 --stride 96 --holdout 60 --saliency --out data/joint_s.h5": How(CUT, makes=("data/joint_s.h5",)),
    "python dataprocessing.py --colour --data train/MSRS train/RoadScene --patch-size 160 --stride 160 --holdout 60 "
    "--out data/IVF_colour.h5": How(CUT, makes=("data/IVF_colour.h5",)),
    "python dataprocessing.py --degrade": How(makes=("data/degraded_0.png",)),
    "python dataprocessing.py --vi my_images/visible --ir my_images/thermal --out data/mine.h5": How(
        CUT, makes=("data/mine.h5",)
    ),
    "python evaluate.py --fused A --data test_img/TNO --compare-protocols": How("--jobs 1", says="toolbox"),
    "python evaluate.py --fused A B --data test_img/TNO --against A": How("--jobs 1", says="Wilcoxon"),
    "python evaluate.py --fused data/fused --ir data/ir --vi data/vi --baselines": How("--jobs 1", says="average"),
    "python evaluate.py --fused path/to/MyMethod --data test_img/TNO --baselines": How("--jobs 1", says="MyMethod"),
    "python evaluate.py --fused test_img/Sample_IVF/vi --data test_img/Sample_IVF --compare-protocols": How(
        "--jobs 1", says="standard"
    ),
    "python evaluate.py --list-metrics": How(says="Qabf"),
    "python evaluate.py --verify-data path/to/test_img": How(says="4 of 4 files as published"),
    "python evaluate.py --verify-data test_img": How(says="4 of 4 files as published"),
    "python fuse.py --ir data/ir --vi data/vi --out data/fused": How(makes=("data/fused/1.png",)),
    "python fuse.py --ir data/ir --vi data/vi --out data/fused --list data/pairs.json": How(makes=("data/pairs.json",)),
    "python fuse.py --ir data/ir --vi data/vi --out data/grey --colour none --suffix .png": How(
        makes=("data/grey/2.png",)
    ),
    "python fuse.py --ir detection/ir --vi detection/vi --out detection/fused --list detection/pairs.json "
    "--annotations detection/labels": How(makes=("detection/pairs.json", "detection/fused/2.png")),
    "python fuse.py --ir frames/ir --vi frames/vi --out frames/fused --sequence": How(
        makes=("frames/fused/2.png",), says="flicker"
    ),
    "python fuse.py --ir frames/ir --vi frames/vi --out fused.avi --fps 25": How(makes=("fused.avi",)),
    "python fuse.py --ir ir.mp4 --vi vi.mp4 --out fused.mkv": How(makes=("fused.mkv",), says="flicker"),
    "python fuse.py --ir ir.png --vi vi.png --out fused.png": How(makes=("fused.png",), says="colour, 8 bits"),
    "python fuse.py --ir ir.png --vi vi.png --out fused.png --max-memory 2GB": How(makes=("fused.png",)),
    "python fuse.py --ir ir.png --vi vi.png --out fused.png --panel": How(makes=("fused_panel.png",)),
    "python fuse.py --ir ir16.png --vi vi16.png --out fused16.png --bits 16": How(says="16 bits"),
    "python fuse.py --ir small_ir.png --vi vi.png --out fused.png --homography H.txt": How(says="48x44"),
    "python fuse.py --ir small_ir.png --vi vi.png --out fused.png --resize-ir": How(says="48x44"),
    "python fuse.py --task mif --vi mri.png --ir pet.png --out fused.png": How(makes=("fused.png",)),
    "python fuse.py --task mif --vi my_scans/MRI --ir my_scans/CT --out my_scans/fused": How(
        makes=("my_scans/fused/1.png",)
    ),
    "python test_IVF.py": How(makes=RESULT, says="The test result of TNO :"),
    "python test_IVF.py --baselines": How(makes=RESULT, says="ir only"),
    "python test_IVF.py --data folder --sets A B": How(says="The test result of B :"),
    "python test_IVF.py --data my_pairs": How(makes=("test_result/CDDFuse_IVF/my_pairs/1.png",)),
    "python test_IVF.py --data my_pairs --max-memory 2GB": How(says="2 pairs"),
    "python test_IVF.py --data other_pairs --weights runs/mine/CDDFuse_IVF.pth --out test_result/mine": How(
        there=(("runs/mine/CDDFuse_IVF.pth", "models/CDDFuse_IVF.pth"),), says="runs/mine/CDDFuse_IVF.pth"
    ),
    "python test_IVF.py --data test_img/Sample_IVF --colour": How(
        makes=("test_result/CDDFuse_IVF/Sample_IVF/colour/street_night.png",)
    ),
    "python test_IVF.py --device cpu": How(makes=RESULT, says="cpu float32"),
    "python test_IVF.py --max-memory 2GB": How(makes=RESULT),
    "python test_IVF.py --system fsidfusion": How(makes=("test_result/FSIDFusion/TNO/1.png",)),
    "python test_MIF.py --system fsidfusion": How(makes=("test_result/FSIDFusion/MRI_SPECT/1.png",)),
    "python test_IVF.py --system fsidfusion --weights runs/fsidfusion_ivf/FSIDFusion_IVF.pth": How(
        there=weights("runs/fsidfusion_ivf/FSIDFusion_IVF.pth", "fsidfusion"), says="The test result of TNO :"
    ),
    "python test_IVF.py --system tsdm": How(makes=("test_result/TSDM-Fusion_student/TNO/1.png",)),
    "python test_IVF.py --system tsdm cddfuse mlfuse --degrade 0": How(
        makes=("test_result/CDDFuse_IVF/TNO_degraded_0/given_ir/1.png",)
    ),
    "python test_IVF.py --weights path/to/published.pth": How(makes=("test_result/published/TNO/1.png",)),
    "python test_IVF.py --weights published": How(
        there=PUBLISHED, makes=("test_result/CDDFuse_IVF_published/TNO/1.png",)
    ),
    "python test_IVF.py --weights runs/cddfuse_ivf/CDDFuse_IVF.pth --out test_result/mine": How(
        there=(("runs/cddfuse_ivf/CDDFuse_IVF.pth", "models/CDDFuse_IVF.pth"),),
        makes=("test_result/mine/CDDFuse_IVF/TNO/metrics.json",),
    ),
    "python test_MIF.py": How(makes=("test_result/CDDFuse_MIF/MRI_SPECT/1.png",), says="CDDFuse_IVF"),
    "python test_MIF.py --data flat_scans --pairs flat --stems mri ct": How(says="The test result of flat_scans :"),
    "python test_MIF.py --data my_scans": How(says="The test result of my_scans :"),
    "python test_IVF.py --system mlfuse": How(makes=("test_result/MLFuse/TNO/1.png",)),
    "python test_MIF.py --system mlfuse": How(makes=("test_result/MLFuse/MRI_SPECT/1.png",)),
    "python test_MIF.py --system mlfuse --weights model_fuse.pth": How(
        there=weights("model_fuse.pth", "mlfuse"), says="MLFuse"
    ),
    "python test_MIF.py --system mlfuse --weights model_fuse.pth --legacy-rounding --data ct_mri_set --pairs flat "
    "--stems mrict ct": How(there=weights("model_fuse.pth", "mlfuse"), says="truncated to 8 bits"),
    "python test_MIF.py --weights published": How(there=PUBLISHED, says="CDDFuse_MIF"),
    "python train.py --data data/IVF.h5 --crop 64 --flips --epoch-batches 50 --precision bfloat16 --learning-rate 1e-3 "
    "--schedule cosine --warmup-steps 50 --stage1-epochs 8 --stage2-epochs 28": How(STAGES, IVF, IVF_RUN),
    "python train.py --data data/IVF_h.h5 --init models/CDDFuse_IVF.pth --seed 5 --epoch-batches 50 "
    "--learning-rate 3e-4 --warmup-steps 50 --ema 0.99 --stage1-epochs 0 --stage2-epochs 24": stage2("IVF_h", IVF_RUN),
    "python train.py --data data/IVF_h.h5 --init models/CDDFuse_IVF.pth --crop 128 --batch-size 2 --seed 6 "
    "--epoch-batches 50 --learning-rate 2e-4 --warmup-steps 20 --ema 0.98 --stage1-epochs 0 --stage2-epochs 6": stage2(
        "IVF_h", IVF_RUN
    ),
    "python train.py --data data/IVF_256.h5 --init models/CDDFuse_IVF.pth --crop 256 --batch-size 1 --seed 8 "
    "--epoch-batches 50 --learning-rate 5e-5 --warmup-steps 20 --ema 0.98 --stage1-epochs 0 --stage2-epochs 4": stage2(
        "IVF_256", IVF_RUN
    ),
    "python train.py --data data/IVF_h.h5 --init models/CDDFuse_IVF.pth --crop 128 --batch-size 2 --seed 9 "
    "--epoch-batches 50 --learning-rate 2e-4 --warmup-steps 20 --ema 0.96 --stage1-epochs 0 --stage2-epochs 3 "
    "--precision float32 --difference-weight 0.1 --fused-ssim-weight 0.1": stage2("IVF_h", IVF_RUN),
    "python train.py --data data/IVF_256.h5 --init models/CDDFuse_IVF.pth --crop 256 --batch-size 1 --seed 11 "
    "--epoch-batches 50 --learning-rate 5e-5 --warmup-steps 10 --ema 0.97 --stage1-epochs 0 --stage2-epochs 4 "
    "--precision float32 --difference-weight 0.12 --fused-ssim-weight 0.1 --range-weight 12 --range-radius 0": stage2(
        "IVF_256", IVF_RUN
    ),
    "python train.py --data data/IVF_256.h5 --init models/CDDFuse_IVF.pth --crop 192 --batch-size 1 --seed 14 "
    "--epoch-batches 50 --learning-rate 5e-5 --warmup-steps 10 --ema 0.98 --stage1-epochs 0 --stage2-epochs 7 "
    "--difference-weight 0.15 --fused-ssim-weight 0.2 --range-weight 8 --range-radius 0": stage2("IVF_256", IVF_RUN),
    "python train.py --data data/IVF_256.h5 --init models/CDDFuse_IVF.pth --crop 192 --batch-size 1 --seed 15 "
    "--epoch-batches 50 --learning-rate 5e-5 --warmup-steps 10 --ema 0.98 --stage1-epochs 0 --stage2-epochs 8 "
    "--difference-weight 0.15 --fused-ssim-weight 0.2 --range-weight 8 --range-radius 0": stage2("IVF_256", IVF_RUN),
    "python train.py --data data/IVF_h.h5 --init models/CDDFuse_IVF.pth --epoch-batches 50 --learning-rate 6e-4 "
    "--warmup-steps 50 --ema 0.99 --stage1-epochs 0 --stage2-epochs 22": stage2("IVF_h", IVF_RUN),
    "python train.py --data data/IVF_h.h5 --init models/CDDFuse_IVF.pth --epoch-batches 50 --learning-rate 4e-4 "
    "--warmup-steps 50 --ema 0.99 --stage1-epochs 0 --stage2-epochs 20": stage2("IVF_h", IVF_RUN),
    "python train.py --data data/MSRS.h5": How(STAGES, MSRS, IVF_RUN),
    "python train.py --data data/MSRS.h5 --resume auto": How(
        STAGES, MSRS, IVF_RUN, says="resumed from", before=f"{STAGES} --max-minutes 0.0001"
    ),
    "python train.py --data data/mine.h5 --init models/CDDFuse_IVF.pth --out runs/mine --crop 128 --batch-size 2 "
    "--epoch-batches 50 --learning-rate 2e-4 --warmup-steps 20 --ema 0.98 --stage1-epochs 0 --stage2-epochs 6": How(
        SECOND_STAGE, (("data/mine.h5", PATCHES),), ("runs/mine/CDDFuse_IVF.pth",)
    ),
    "python train.py --system fsidfusion --data data/joint_s.h5 --crop 64 --flips --precision bfloat16 "
    "--schedule cosine --learning-rate 1e-3 --warmup-steps 50 --ema 0.99 --epoch-batches 50 --stage1-epochs 6 "
    "--stage2-epochs 14 --out runs/fsidfusion": How(
        STAGES, (("data/joint_s.h5", "stand-ins/saliency.h5"),), ("runs/fsidfusion/FSIDFusion_IVF.pth",)
    ),
    "python train.py --system fsidfusion --data data/MSRS.h5": How(
        STAGES, MSRS, ("runs/fsidfusion_ivf/FSIDFusion_IVF.pth",)
    ),
    "python train.py --system mlfuse --data data/joint_s.h5 --out runs/mlfuse --batch-size 8 --crop 96 --flips "
    "--precision bfloat16 --learning-rate 1e-3 --warmup-steps 50 --ema 0.99 --epoch-batches 100 --epochs 24": How(
        f"{SHORT} --epochs 1 --validate-every 0",
        (("data/joint_s.h5", "stand-ins/saliency.h5"),),
        ("runs/mlfuse/MLFuse_IVF.pth",),
    ),
    "python train.py --system mlfuse --data data/saliency.h5": How(
        f"{SHORT} --epochs 1 --validate-every 0", (("data/saliency.h5", "stand-ins/saliency.h5"),), ("runs/mlfuse_ivf",)
    ),
    "python train.py --system tsdm --recipe student --data data/colour.h5 --init runs/tsdm_ivf/TSDM-Fusion_IVF.pth "
    "--out runs/tsdm_student": How(
        f"{SHORT} --student-epochs 1 --adversarial-epochs 1",
        (*COLOUR, *weights("runs/tsdm_ivf/TSDM-Fusion_IVF.pth", "tsdm_teacher")),
        ("runs/tsdm_student/TSDM-Fusion_IVF.pth",),
    ),
    "python train.py --system tsdm --recipe teacher --data data/colour.h5": How(
        f"{SHORT} --teacher-epochs 1", COLOUR, ("runs/tsdm_ivf/TSDM-Fusion_IVF.pth",)
    ),
    "python train.py --system tsdm --recipe student --data data/IVF_colour.h5 --crop 48 --flips --precision bfloat16 "
    "--schedule cosine --warmup-steps 100 --ema 0.99 --epoch-batches 100 --batch-size 6 --learning-rate 8e-4 "
    "--student-epochs 17 --adversarial-epochs 0 --init runs/teacher/TSDM-Fusion_IVF.pth --out runs/student": How(
        f"{SHORT} --student-epochs 1",
        (("data/IVF_colour.h5", "stand-ins/colour.h5"), *weights("runs/teacher/TSDM-Fusion_IVF.pth", "tsdm_teacher")),
        ("runs/student/TSDM-Fusion_IVF.pth",),
    ),
    "python train.py --system tsdm --recipe teacher --data data/IVF_colour.h5 --crop 32 --flips --precision bfloat16 "
    "--schedule cosine --warmup-steps 20 --ema 0.99 --epoch-batches 100 --batch-size 8 --teacher-epochs 36 "
    "--out runs/teacher": How(
        f"{SHORT} --teacher-epochs 1",
        (("data/IVF_colour.h5", "stand-ins/colour.h5"),),
        ("runs/teacher/TSDM-Fusion_IVF.pth",),
    ),
    "python train.py --task mif --data data/MIF.h5": How(STAGES, MIF, MIF_RUN),
    "python train.py --task mif --data data/MIF_ct2.h5 --init models/CDDFuse_MIF.pth --seed 5 --epoch-batches 50 "
    "--learning-rate 3e-4 --warmup-steps 50 --ema 0.99 --stage1-epochs 0 --stage2-epochs 24": stage2(
        "MIF_ct2", MIF_RUN
    ),
    "python train.py --task mif --data data/MIF_ct3.h5 --init models/CDDFuse_MIF.pth --epoch-batches 50 "
    "--learning-rate 4e-4 --warmup-steps 50 --ema 0.99 --stage1-epochs 0 --stage2-epochs 26": stage2(
        "MIF_ct3", MIF_RUN
    ),
    "python train.py --task mif --data data/MIF.h5 --crop 64 --flips --epoch-batches 50 --precision bfloat16 "
    "--learning-rate 1e-3 --schedule cosine --warmup-steps 50 --stage1-epochs 6 --stage2-epochs 22": How(
        STAGES, MIF, MIF_RUN
    ),
    "python train.py --task mif --data data/MIF_h.h5 --init models/CDDFuse_MIF.pth --crop 128 --batch-size 2 --seed 9 "
    "--epoch-batches 50 --learning-rate 1.5e-4 --warmup-steps 20 --ema 0.97 --stage1-epochs 0 --stage2-epochs 6 "
    "--precision float32 --difference-weight 0.1 --fused-ssim-weight 0.1 --range-weight 5 --range-radius 0": stage2(
        "MIF_h", MIF_RUN
    ),
    "python train.py --task mif --data data/MIF_h.h5 --init models/CDDFuse_MIF.pth --crop 128 --batch-size 2 --seed 12 "
    "--epoch-batches 50 --learning-rate 1e-4 --warmup-steps 10 --ema 0.97 --stage1-epochs 0 --stage2-epochs 3 "
    "--precision float32 --difference-weight 0.12 --fused-ssim-weight 0.1 --range-weight 2 --range-radius 0": stage2(
        "MIF_h", MIF_RUN
    ),
    "python train.py --task mif --data data/MIF_h.h5 --init models/CDDFuse_MIF.pth --epoch-batches 50 "
    "--learning-rate 6e-4 --warmup-steps 50 --ema 0.99 --stage1-epochs 0 --stage2-epochs 22": stage2("MIF_h", MIF_RUN),
    "python train.py --task mif --data data/MIF_h.h5 --init models/CDDFuse_MIF.pth --epoch-batches 50 "
    "--learning-rate 4e-4 --warmup-steps 50 --ema 0.99 --stage1-epochs 0 --stage2-epochs 24": stage2("MIF_h", MIF_RUN),
    "python train.py --task mif --data data/scans.h5 --init models/CDDFuse_MIF.pth --out runs/scans --crop 128 "
    "--batch-size 2 --epoch-batches 50 --learning-rate 2e-4 --warmup-steps 20 --ema 0.98 --stage1-epochs 0 "
    "--stage2-epochs 6": How(SECOND_STAGE, (("data/scans.h5", PATCHES),), ("runs/scans/CDDFuse_MIF.pth",)),
    "torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py "
    "--data data/MSRS.h5": How(not_run=PROCESSES),
    "torchrun --nproc-per-node=4 train.py --data data/MSRS.h5": How(not_run=PROCESSES),
    "until python train.py --data data/MSRS.h5 --max-minutes 50 --resume auto; do [ $? = 75 ] || break; done": How(
        not_run="a loop of the shell; test_the_loop_goes_on_while_the_exit_code_is_75 runs it"
    ),
}
