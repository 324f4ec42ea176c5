from .data.records import (
    read_records as read_records,
    records_from as records_from,
    split_records as split_records,
    write_records as write_records,
)
from .data.splits import Splits as Splits, apart as apart, read_splits as read_splits
from .errors import errors_in_words as errors_in_words
from .estimate import estimate_run as estimate_run
from .export.exportable import check_exportable as check_exportable
from .export.gguf import export_adapter as export_adapter, export_gguf as export_gguf
from .export.merge import merge_adapter as merge_adapter
from .export.reasoning_judge import reasoning_judge as reasoning_judge
from .export.small_seed_model import small_seed_model as small_seed_model
from .judge import Judge as Judge
from .judgement import Judgement as Judgement
from .metrics import (
    choose_gate as choose_gate,
    compare_judges as compare_judges,
    evaluate as evaluate,
    format_table as format_table,
)
from .options import RunOptions as RunOptions
from .presets import (
    Preset as Preset,
    parse_options as parse_options,
    preset_for as preset_for,
    settings_of as settings_of,
)
from .record import Record as Record, Rubric as Rubric
from .report.card import write_model_card as write_model_card
from .report.finish import Measured as Measured, finish_run as finish_run
from .report.page import write_report as write_report
from .run import Run as Run
from .scale import ScoreScale as ScoreScale
from .self_cot import generate_cots as generate_cots
from .spec import JudgeSpec as JudgeSpec, Sampling as Sampling, make_spec as make_spec
from .training.precision import pick_dtype as pick_dtype
from .training.seed_model import add_lora as add_lora, load_seed as load_seed
from .training.settings import TrainSettings as TrainSettings
from .training.stage import train_adapter as train_adapter, train_stage as train_stage
from .training.toy_seed_model import make_toy_seed_model as make_toy_seed_model
from .version import __version__ as __version__
