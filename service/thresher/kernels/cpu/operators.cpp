// The operators `thresher::lookup` and `thresher::update` for the CPU: checks, work shared out to threads, kernels
// chosen for the processor. `ops.py` has the schemas, `reference.py` the same in PyTorch.
//
// How work is cut into tasks depends on the batch alone, and a task adds in a fixed order: results do not depend on the
// number of threads.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <string>

#include "kernels.h"
#include "merge.h"

namespace thresher {
namespace {

using at::Tensor;
using Ints = at::IntArrayRef;

// The best the processor has. THRESHER_CPU=avx2 or portable asks for less, for tests.
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* wish = std::getenv("THRESHER_CPU");
    const std::string most = wish ? wish : "avx512";
    TORCH_CHECK_VALUE(most == "avx512" || most == "avx2" || most == "portable",
                      "THRESHER_CPU=", most, ": must be avx512, avx2 or portable");
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (most == "avx512" && avx512) return avx512_kernels();
    if (most != "portable" && avx2) return avx2_kernels();
#endif
    return portable_kernels();
  }();
  return chosen;
}

// Runs tasks on all threads; each takes the next one that is left, since tables differ in size.
template <typename Task>
void run_tasks(int64_t count, const Task& task) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) task(i);
  });
}

// A group of tables and one batch for it, as the kernels want them.
struct Call {
  Dtype dtype;
  Kind kind;
  Shared shared;
  Combine combine;
  float pressure;
  int64_t batch;
  std::vector<Table> tables;
  std::vector<Bags> bags;               // of each feature
  std::vector<int64_t> feature_tables, columns;
  int64_t width = 0;                    // columns of the pooled vectors
  std::vector<float> column_thresholds;
  std::vector<int64_t> first_columns;   // of each table, in column_thresholds
  Tensor offsets, indices, sample_weights;
};

int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }

// Every id must be a row of its feature's table; an id of a composed table, any number from 0 up.
void check_ids(const Call& call) {
  for (size_t f = 0; f < call.bags.size(); ++f) {
    const Bags& bags = call.bags[f];
    const int64_t first = bags.offsets[0], last = bags.offsets[call.batch];
    const Table& table = call.tables[call.feature_tables[f]];
    const auto end = static_cast<uint64_t>(table.partitions ? INT64_MAX : table.rows);  // as unsigned numbers, negative ids are beyond it
    bool bad = false;
    for (int64_t i = first; i < last; ++i) bad |= static_cast<uint64_t>(bags.indices[i]) >= end;
    for (int64_t i = first; bad && i < last; ++i) {
      TORCH_CHECK_INDEX(static_cast<uint64_t>(bags.indices[i]) < end, "feature ", f, ": id ", bags.indices[i],
                        " at place ", i, " is not a row of its table, which has ", end, " rows");
    }
  }
}

Call prepare(const Tensor& weights, const Tensor& thresholds, const Tensor& mask, const Tensor& starts,
             const Tensor& indices, const Tensor& offsets, const std::optional<Tensor>& sample_weights,
             double pressure, Ints rows, Ints dims, Ints feature_tables, Ints partitions, int64_t combine,
             int64_t shared, bool mean) {
  Call call;
  switch (weights.scalar_type()) {
    case at::kFloat: call.dtype = Dtype::kFloat; break;
    case at::kHalf: call.dtype = Dtype::kHalf; break;
    case at::kBFloat16: call.dtype = Dtype::kBFloat16; break;
    default: TORCH_CHECK_VALUE(false, "weights are ", weights.scalar_type(), "; must be float32, float16 or bfloat16");
  }
  TORCH_CHECK_VALUE(rows.size() == dims.size(), "rows and dims must name the same tables");
  const bool masked = mask.numel() > 0;
  TORCH_CHECK_VALUE(!masked || shared == 0, "masked tables have no thresholds; give one or the other");
  TORCH_CHECK_VALUE(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt,
                    "indices are ", indices.scalar_type(), "; must be int32 or int64");
  for (const Tensor& tensor : {weights, thresholds, mask, starts}) {
    TORCH_CHECK_VALUE(tensor.is_contiguous(), "flat tensors must be contiguous");
  }
  const auto features = static_cast<int64_t>(feature_tables.size());
  TORCH_CHECK_VALUE(features > 0 && (offsets.numel() - 1) % features == 0,
                    "offsets has ", offsets.numel(), " entries; must be features · B + 1, with ", features, " features");
  call.shared = static_cast<Shared>(shared);
  call.combine = static_cast<Combine>(combine);
  constexpr Kind kinds[] = {Kind::kPlain, Kind::kColumn, Kind::kColumn, Kind::kRow, Kind::kElement};
  call.kind = masked ? Kind::kMasked : kinds[shared];
  call.pressure = static_cast<float>(pressure);
  call.batch = (offsets.numel() - 1) / features;
  call.indices = indices.to(at::kLong).contiguous();
  call.offsets = offsets.to(at::kLong).contiguous();
  const auto* all_offsets = call.offsets.data_ptr<int64_t>();
  TORCH_CHECK_VALUE(all_offsets[0] >= 0 && all_offsets[features * call.batch] <= indices.numel(),
                    "offsets end at ", all_offsets[features * call.batch], ", but there are ", indices.numel(), " ids");
  for (int64_t i = 0; i < features * call.batch; ++i) {
    TORCH_CHECK_VALUE(all_offsets[i] <= all_offsets[i + 1], "offsets fall at bag ", i);
  }
  const float* factors = nullptr;
  if (sample_weights.has_value()) {
    TORCH_CHECK_VALUE(sample_weights->scalar_type() == at::kFloat && sample_weights->numel() == indices.numel(),
                      "sample_weights must be float32, one for each id");
    call.sample_weights = sample_weights->contiguous();
    factors = call.sample_weights.data_ptr<float>();
  }

  int64_t first_element = 0, first_row = 0, first_byte = 0, first_start = 0, first_column = 0;
  const int64_t* split = partitions.begin();
  const int64_t element_bytes = weights.element_size();
  for (size_t t = 0; t < rows.size(); ++t) {
    TORCH_CHECK_VALUE(dims[t] >= 1 && dims[t] <= kMaxDim, "table ", t, " has ", dims[t], " columns; must be 1 to ",
                      kMaxDim);
    Table table = {};
    table.rows = rows[t];
    table.dim = dims[t];
    table.weights = static_cast<char*>(weights.data_ptr()) + (masked ? 0 : first_element * element_bytes);
    if (call.shared == Shared::kRow) table.thresholds = thresholds.data_ptr<float>() + first_row;
    if (call.shared == Shared::kElement) table.thresholds = thresholds.data_ptr<float>() + first_element;
    if (masked) {
      table.masks = mask.data_ptr<uint8_t>() + first_byte;
      table.starts = starts.data_ptr<int64_t>() + first_start;
    }
    if (!partitions.empty()) {
      table.partitions = static_cast<int>(*split++);
      TORCH_CHECK_VALUE(table.partitions <= kMaxPartitions, "table ", t, " has ", table.partitions,
                        " partitions; at most ", kMaxPartitions);
      int64_t before = 0;
      for (int p = 0; p < table.partitions; ++p) {
        const int64_t divisor = *split++, modulus = *split++;
        TORCH_CHECK_VALUE(divisor > 0 && modulus > 0, "table ", t, ": a partition (x div ", divisor, ") mod ", modulus,
                          " is none; both must be at least 1");
        table.divisors[p] = {divisor, 1.0 / static_cast<double>(divisor)};
        table.moduli[p] = {modulus, 1.0 / static_cast<double>(modulus)};
        table.first_rows[p] = before;
        before += modulus;
      }
      TORCH_CHECK_VALUE(before <= table.rows, "table ", t, ": its partitions need ", before, " rows, it has ",
                        table.rows);
      TORCH_CHECK_VALUE(call.combine != Combine::kConcat || table.dim * table.partitions <= kMaxDim, "table ", t,
                        ": its concatenated vectors have more than ", kMaxDim, " columns");
    }
    call.tables.push_back(table);
    call.first_columns.push_back(first_column);
    first_element += rows[t] * dims[t];
    first_row += rows[t];
    const int64_t mask_bytes = (dims[t] + 7) / 8;
    first_byte += rows[t] * mask_bytes;
    first_start += (rows[t] + kBlockRows - 1) / kBlockRows + 1;
    first_column += padded(dims[t]);
  }
  TORCH_CHECK_VALUE(masked || weights.numel() >= first_element, "weights hold ", weights.numel(), " values, the tables ",
                    first_element);
  TORCH_CHECK_VALUE(!masked || (mask.numel() >= first_byte + 8 && starts.numel() >= first_start),
                    "mask or starts are too short for the tables");
  if (call.kind == Kind::kColumn) {  // g of every column, once a call
    call.column_thresholds.assign(first_column, 0.0f);
    const float* s = thresholds.data_ptr<float>();
    for (size_t t = 0; t < rows.size(); ++t) {
      float* to = call.column_thresholds.data() + call.first_columns[t];
      for (int64_t c = 0; c < dims[t]; ++c) {
        to[c] = 1.0f / (1.0f + std::exp(-(*s + call.pressure)));
        s += call.shared == Shared::kColumn;
      }
      s += call.shared == Shared::kTable;
      call.tables[t].column_thresholds = to;
    }
  }
  for (int64_t f = 0; f < features; ++f) {
    const int64_t t = feature_tables[f];
    TORCH_CHECK_VALUE(t >= 0 && t < static_cast<int64_t>(rows.size()), "feature ", f, " names table ", t);
    const Table& table = call.tables[t];
    call.feature_tables.push_back(t);
    call.columns.push_back(call.width);
    call.width += call.combine == Combine::kConcat && table.partitions ? table.dim * table.partitions : table.dim;
    call.bags.push_back({call.indices.data_ptr<int64_t>(), all_offsets + f * call.batch, factors, mean, false});
  }
  check_ids(call);
  return call;
}

// Bags of one feature that one task looks up; small enough to share out, large enough to stream.
constexpr int64_t kBagsPerTask = 512;

// Pooled vectors of more bytes than this would not stay in a core's cache until they are used; written past the caches
// they cost a third less.
constexpr int64_t kStreamBytes = 2 << 20;

Tensor lookup(const Tensor& weights, const Tensor& thresholds, const Tensor& mask, const Tensor& starts,
              const Tensor& indices, const Tensor& offsets, const std::optional<Tensor>& sample_weights,
              double pressure, Ints rows, Ints dims, Ints feature_tables, Ints partitions, int64_t combine,
              int64_t shared, bool mean) {
  Call call = prepare(weights, thresholds, mask, starts, indices, offsets, sample_weights, pressure, rows, dims,
                      feature_tables, partitions, combine, shared, mean);
  Tensor out = at::empty({call.batch, call.width}, weights.options().dtype(at::kFloat));
  const bool stream = out.nbytes() > kStreamBytes && call.width * sizeof(float) % 64 == 0;
  for (Bags& bags : call.bags) bags.stream = stream;
  const int64_t features = static_cast<int64_t>(call.bags.size());
  const int64_t parts = (call.batch + kBagsPerTask - 1) / kBagsPerTask;
  float* to = out.data_ptr<float>();
  const Kernels& kernel = kernels();
  run_tasks(features * parts, [&](int64_t task) {
    const int64_t feature = task / parts, first = task % parts * kBagsPerTask;
    const int64_t last = std::min(first + kBagsPerTask, call.batch);
    kernel.lookup(call.tables[call.feature_tables[feature]], call.kind, call.dtype, call.combine, call.bags[feature],
                  call.pressure, first, last, to + call.columns[feature], call.width);
  });
  return out;
}

// A part of one table's rows that one task merges and updates: those whose number ends in `part`, of 2^bits.
struct Task {
  int64_t table;
  uint64_t part;
  int bits;
};

// A table with more than a quarter of the batch's ids is shared out, by the last bits of its rows. Each part reads all
// of the table's ids, so there are few.
constexpr int64_t kShares = 4;
constexpr int kMostPartBits = 2;

// Everything a task keeps from one stage of a composed update to the next; of a plain one, buffers of its thread.
struct Work {
  Runs runs;
  std::vector<uint32_t> bag_of;
  std::vector<int64_t> id_of;
  std::vector<float> merged;
};

// A task's rows in order, and what the kernels need beside them.
Merged merge(const Call& call, const Task& task, const std::vector<int64_t>& features, const std::vector<Bags>& bags,
             const std::vector<int64_t>& columns, const Tensor& grad, Work& work) {
  const Table& table = call.tables[task.table];
  const bool by_id = table.partitions > 0 || call.sample_weights.defined();
  int64_t ids = 0;
  for (int64_t f : features) ids += call.bags[f].offsets[call.batch] - call.bags[f].offsets[0];
  const int64_t pairs = ids * std::max(1, table.partitions);
  const int64_t rows = ((table.rows - 1) >> task.bits) + 1;  // that can be the task's
  TORCH_CHECK_VALUE(bits_below(rows) <= 32 && std::max<int64_t>(pairs, features.size() * call.batch) <= UINT32_MAX,
                    "table ", task.table, ": ", pairs, " ids for ", table.rows,
                    " rows in one update are more than 32 bits can count; make the batch smaller, or shard the table");

  // Calls `found` with row and payload of all ids of the task; rows without the bits in which they are all alike.
  auto each_pair = [&](auto found) {
    const uint64_t part = task.part, mask = (uint64_t{1} << task.bits) - 1;  // locals, which no store can change
    const int64_t batch = call.batch, partitions = table.partitions;
    const int bits = task.bits;
    const bool per_id = by_id;
    uint32_t payload = 0;
    for (size_t own = 0; own < features.size(); ++own) {
      const int64_t *ids_of = bags[own].indices, *offsets = bags[own].offsets;
      for (int64_t b = 0; b < batch; ++b) {
        const auto number = static_cast<uint32_t>(own * batch + b);
        const int64_t stop = offsets[b + 1];
        for (int64_t i = offsets[b]; i < stop; ++i, ++payload) {
          const uint32_t value = per_id ? payload : number;
          if (partitions == 0) {
            const uint64_t row = ids_of[i];
            if ((row & mask) == part) found(row >> bits, value);
            continue;
          }
          for (int p = 0; p < partitions; ++p) {
            const uint64_t row = table.row_of(p, ids_of[i]);
            if ((row & mask) == part) found(row >> bits, value);
          }
        }
      }
    }
    return found;
  };
  if (by_id) {
    work.bag_of.clear();
    work.id_of.clear();
    for (size_t own = 0; own < features.size(); ++own) {
      for (int64_t b = 0; b < call.batch; ++b) {
        for (int64_t i = bags[own].offsets[b]; i < bags[own].offsets[b + 1]; ++i) {
          work.bag_of.push_back(static_cast<uint32_t>(own * call.batch + b));
          work.id_of.push_back(i);
        }
      }
    }
  }
  Runs& runs = work.runs;
  if (should_count(rows, pairs)) {
    count_rows(each_pair, rows, pairs, runs);
  } else {
    sort_rows(each_pair, rows, pairs, runs);
  }
  if (task.bits > 0) {
    for (int64_t i = 0; i < runs.different; ++i) runs.rows[i] = runs.rows[i] << task.bits | task.part;
  }
  Merged merged = {};
  merged.payloads = runs.payloads.data();
  merged.count = static_cast<int64_t>(runs.payloads.size());
  merged.rows = runs.rows.data();
  merged.firsts = runs.firsts.data();
  merged.different = runs.different;
  merged.simple = !by_id && features.size() == 1 && !bags[0].mean;
  merged.bag_of = by_id ? work.bag_of.data() : nullptr;
  merged.id_of = by_id ? work.id_of.data() : nullptr;
  merged.grad = grad.data_ptr<float>();
  merged.stride = call.width;
  merged.batch = call.batch;
  merged.columns = columns.data();
  merged.bags = bags.data();
  return merged;
}

std::tuple<Tensor, Tensor> update(
    const Tensor& grad, Tensor weights, at::TensorList weight_states, Tensor thresholds,
    at::TensorList threshold_states, const Tensor& mask, const Tensor& starts, Tensor seen, const Tensor& indices,
    const Tensor& offsets, const std::optional<Tensor>& sample_weights, double pressure, Ints rows, Ints dims,
    Ints feature_tables, Ints partitions, int64_t combine, int64_t shared, bool mean, int64_t optimizer,
    double learning_rate, double weight_decay, double threshold_learning_rate, double threshold_weight_decay,
    double eps, int64_t step, bool sample_weight_grad) {
  Call call = prepare(weights, thresholds, mask, starts, indices, offsets, sample_weights, pressure, rows, dims,
                      feature_tables, partitions, combine, shared, mean);
  TORCH_CHECK_VALUE(grad.scalar_type() == at::kFloat && grad.is_contiguous() && grad.dim() == 2 &&
                        grad.size(0) == call.batch && grad.size(1) == call.width,
                    "grad must be a contiguous float32 tensor [", call.batch, ", ", call.width, "]");
  const Rule rule = static_cast<Rule>(optimizer);
  const bool rowwise = rule == Rule::kRowwiseAdagrad, learned = call.shared != Shared::kNone;
  const Update settings = {static_cast<float>(learning_rate),
                           static_cast<float>(weight_decay),
                           static_cast<float>(threshold_learning_rate),
                           static_cast<float>(threshold_weight_decay),
                           static_cast<float>(eps),
                           static_cast<float>(1 - std::pow(0.9, static_cast<double>(step))),
                           static_cast<float>(1 - std::pow(0.999, static_cast<double>(step))),
                           0.0f};
  auto settings_of = [&](const Table& table) {
    Update own = settings;
    own.inverse_dim = 1.0f / static_cast<float>(table.dim);
    return own;
  };

  // Where each table's states, thresholds' states and flags lie.
  int64_t first_element = 0, first_row = 0;
  for (Table& table : call.tables) {
    const bool masked = call.kind == Kind::kMasked;
    for (size_t s = 0; s < weight_states.size(); ++s) {
      table.states[s] = weight_states[s].data_ptr<float>() + (rowwise ? first_row : masked ? 0 : first_element);
    }
    for (size_t s = 0; s < threshold_states.size(); ++s) {
      const bool one_a_row = rowwise || call.shared == Shared::kRow;
      table.threshold_states[s] = threshold_states[s].data_ptr<float>() + (one_a_row ? first_row : first_element);
    }
    if (learned) table.seen = seen.data_ptr<bool>() + first_row;
    first_element += table.rows * table.dim;
    first_row += table.rows;
  }

  const Kernels& kernel = kernels();
  Tensor weight_grad = at::empty({sample_weight_grad ? indices.numel() : 0}, grad.options());
  const int64_t feature_count = static_cast<int64_t>(call.bags.size());
  if (sample_weight_grad) {  // before any row changes
    run_tasks(feature_count, [&](int64_t f) {
      kernel.sample_weight_grad(call.tables[call.feature_tables[f]], call.kind, call.dtype, call.combine, call.bags[f],
                                call.pressure, 0, call.batch, grad.data_ptr<float>() + call.columns[f], call.width,
                                weight_grad.data_ptr<float>());
    });
  }

  const auto tables = static_cast<int64_t>(call.tables.size());
  std::vector<std::vector<int64_t>> features(tables), columns(tables);
  std::vector<std::vector<Bags>> bags(tables);
  std::vector<Task> tasks;
  const int64_t all_ids = call.bags.back().offsets[call.batch] - call.bags.front().offsets[0];
  for (int64_t f = 0; f < feature_count; ++f) {
    const int64_t t = call.feature_tables[f];
    features[t].push_back(f);
    columns[t].push_back(call.columns[f]);
    bags[t].push_back(call.bags[f]);
  }
  for (int64_t t = 0; t < tables; ++t) {
    int64_t ids = 0;
    for (int64_t f : features[t]) ids += call.bags[f].offsets[call.batch] - call.bags[f].offsets[0];
    int bits = 0;
    while (ids >> bits > std::max<int64_t>(all_ids / kShares, 1024) && bits < kMostPartBits &&
           call.tables[t].rows >> bits > 1) {
      ++bits;
    }
    for (uint64_t part = 0; ids > 0 && part < uint64_t{1} << bits; ++part) tasks.push_back({t, part, bits});
  }
  const auto task_count = static_cast<int64_t>(tasks.size());

  const bool per_column = call.kind == Kind::kColumn;
  std::vector<Work> works(partitions.empty() ? 0 : task_count);
  std::vector<Merged> merged(works.size());
  std::vector<std::vector<float>> column_grads(per_column ? task_count : 0);
  auto start = [&](int64_t i, Work& work) {
    const Task& task = tasks[i];
    Merged found = merge(call, task, features[task.table], bags[task.table], columns[task.table], grad, work);
    if (per_column) {
      column_grads[i].assign(padded(call.tables[task.table].dim), 0.0f);
      found.column_grads = column_grads[i].data();
    }
    return found;
  };
  if (partitions.empty()) {
    run_tasks(task_count, [&](int64_t i) {
      static thread_local Work work;
      const Merged found = start(i, work);
      const Table& table = call.tables[tasks[i].table];
      kernel.update(table, call.kind, call.dtype, rule, found, settings_of(table), call.pressure);
    });
  } else {
    run_tasks(task_count, [&](int64_t i) {
      const Table& table = call.tables[tasks[i].table];
      merged[i] = start(i, works[i]);
      works[i].merged.resize(merged[i].different * table.dim);
      merged[i].merged = works[i].merged.data();
      kernel.merge_composed(table, call.kind, call.dtype, call.combine, merged[i], call.pressure);
    });
    run_tasks(task_count, [&](int64_t i) {
      const Table& table = call.tables[tasks[i].table];
      kernel.update_merged(table, call.kind, call.dtype, rule, merged[i], settings_of(table), call.pressure);
    });
  }

  Tensor threshold_grad = at::zeros({per_column ? thresholds.numel() : 0}, grad.options());
  if (per_column) {  // ∂L/∂s = −g(1 − g) Σ ĝ sign(v), in the order of the tasks
    std::vector<int64_t> first(tables, 0);
    for (int64_t t = 1; t < tables; ++t) {
      first[t] = call.shared == Shared::kTable ? t : first[t - 1] + call.tables[t - 1].dim;
    }
    float* to = threshold_grad.data_ptr<float>();
    for (int64_t i = 0; i < task_count; ++i) {
      const int64_t t = tasks[i].table;
      for (int64_t c = 0; c < call.tables[t].dim; ++c) {
        const float g = call.tables[t].column_thresholds[c];
        to[first[t] + (call.shared == Shared::kTable ? 0 : c)] -= g * (1 - g) * column_grads[i][c];
      }
    }
  }
  return {threshold_grad, weight_grad};
}

}  // namespace

TORCH_LIBRARY_IMPL(thresher, CPU, library) {
  library.impl("lookup", lookup);
  library.impl("update", update);
}

}  // namespace thresher
