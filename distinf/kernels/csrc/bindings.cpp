// The Python module: operations on raw addresses. distinf/kernels/native.py checks shapes and dtypes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "all_reduce.h"
#include "all_reduce_bindings.h"
#include "moe_bindings.h"
#include "pack.h"
#include "roofline.h"
#include "runtime.h"

namespace py = pybind11;
using namespace distinf;
// What takes long, or waits for other ranks, gives the interpreter to the watchdog (distinf/comm/watchdog.py) meanwhile.
using NoLock = py::call_guard<py::gil_scoped_release>;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Weight new_weight(Runtime& rt, int64_t n, int64_t k, int bits, int digits, int64_t group, bool offsets,
                  ScaleType scales, bool gated) {
  Weight weight{nullptr, n, k, bits, digits, group, offsets, scales, gated};
  weight.data = static_cast<char*>(rt.arena.allocate(weight.bytes()));
  return weight;
}

void pack_rows(const Weight& weight, int64_t first, int64_t count, uintptr_t src, int64_t stride, bool fp32, bool up) {
  const RowRange rows{first, count};
  fp32 ? pack(at<const float>(src), stride, rows, up, weight) : pack(at<const bf16>(src), stride, rows, up, weight);
}

void pack_integer_rows(const Weight& weight, int64_t first, int64_t count, uintptr_t numbers, int64_t stride,
                       uintptr_t scales, uintptr_t offsets, bool up) {
  pack_integers(at<const uint8_t>(numbers), stride, at<const char>(scales), at<const char>(offsets), {first, count}, up,
                weight);
}

LinearArgs linear_args(Runtime& rt, uintptr_t x, int64_t x_stride, const Weight& weight, uintptr_t bias, int64_t m) {
  rt.reserve_scratch(rt.kernels.linear_scratch_bytes(weight, m, rt.team.size()));
  return {at<const bf16>(x),
          x_stride,
          weight,
          at<const float>(bias),
          Act::kNone,
          nullptr,
          weight.columns(),
          true,
          m,
          nullptr};
}

void run_linear(const Worker& w, Runtime& rt, LinearArgs args) {
  args.scratch = rt.scratch();
  (args.w.bits == 16 ? rt.kernels.linear_bf16 : rt.kernels.linear_quantised)(w, args);
}

void linear(Runtime& rt, uintptr_t x, int64_t x_stride, const Weight& weight, uintptr_t bias, Act act, uintptr_t out,
            bool out_fp32, int64_t m) {
  LinearArgs args = linear_args(rt, x, x_stride, weight, bias, m);
  args.act = act;
  args.out = at<void>(out);
  args.out_fp32 = out_fp32;
  rt.execute([=, &rt](const Worker& w) { run_linear(w, rt, args); });
}

// One weight for each head: out[rows, heads, n + tail_n] = x[rows, head, k] . weight[head][n, k]^T, and tail[rows,
// heads, tail_n] behind it. The heads' rows of the weight are stacked, each a whole number of panels.
void head_linear(Runtime& rt, uintptr_t x, int64_t x_stride, int64_t head_stride, const Weight& weight, int64_t heads,
                 uintptr_t tail, int64_t tail_stride, int64_t tail_n, uintptr_t out, int64_t m) {
  const int64_t n = weight.n / heads, width = n + tail_n;
  if (n % kPanel) throw std::invalid_argument("head_linear: a head's rows are no whole panels");
  LinearArgs args = linear_args(rt, x, x_stride, weight, 0, m);
  args.out_stride = heads * width;
  args.out_fp32 = false;
  args.w.n = n;
  rt.execute([=, &rt](const Worker& w) {
    for (int64_t head = 0; head < heads; head++) {
      if (head) w.barrier();  // the scratch memory is the last head's until all are done with it
      LinearArgs one = args;
      one.x = at<const bf16>(x) + head * head_stride;
      one.w.data = args.w.data + head * (n / kPanel) * args.w.panel_bytes();
      one.out = at<bf16>(out) + head * width;
      run_linear(w, rt, one);
    }
    for (int64_t i = w.begin(m * heads); i < w.end(m * heads); i++) {
      const bf16* from = at<const bf16>(tail) + i / heads * tail_stride + i % heads * tail_n;
      std::copy_n(from, tail_n, at<bf16>(out) + i * width + n);
    }
  });
}

// Into the slot that is next when the operation runs.
void partial_linear(Runtime& rt, uintptr_t x, int64_t x_stride, const Weight& weight, uintptr_t bias, uintptr_t plus,
                    int64_t m, AllReduce& group) {
  LinearArgs args = linear_args(rt, x, x_stride, weight, bias, m);
  args.plus = at<const float>(plus);
  args.out_fp32 = !group.bf16();
  rt.execute([=, &rt, &group](const Worker& w) {
    LinearArgs into_slot = args;
    into_slot.out = group.slot();
    run_linear(w, rt, into_slot);
  });
}

// What a rank without a part of the weight has to add.
void partial_zeros(Runtime& rt, int64_t n, AllReduce& group) {
  rt.execute([=, &group](const Worker& w) {
    const int64_t width = group.bf16() ? 2 : 4;
    std::memset(static_cast<char*>(group.slot()) + w.begin(n) * width, 0, (w.end(n) - w.begin(n)) * width);
  });
}

NormArgs norm_args(Runtime& rt, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, int64_t rows, int64_t n,
                   float eps) {
  rt.reserve_scratch(norm_scratch_bytes(rt.team.size(), n));
  return {at<float>(x), {}, at<const float>(weight), at<const float>(bias), at<bf16>(out), rows, n, eps, nullptr};
}

void run_norm(const Worker& w, Runtime& rt, NormArgs args, const Parts& add) {
  args.add = add;
  args.scratch = rt.scratch();
  (args.bias ? rt.kernels.layer_norm : rt.kernels.rms_norm)(w, args);
}

void norm(Runtime& rt, uintptr_t x, uintptr_t add, uintptr_t weight, uintptr_t bias, uintptr_t out, int64_t rows,
          int64_t n, float eps) {
  const NormArgs args = norm_args(rt, x, weight, bias, out, rows, n, eps);
  rt.execute([=, &rt](const Worker& w) {
    const void* data = at<const void>(add);
    run_norm(w, rt, args, {&data, add ? 1 : 0, false});
  });
}

void all_reduce_norm(Runtime& rt, uintptr_t x, AllReduce& group, uintptr_t weight, uintptr_t bias, uintptr_t out,
                     int64_t rows, int64_t n, float eps) {
  const NormArgs args = norm_args(rt, x, weight, bias, out, rows, n, eps);
  rt.execute([=, &rt, &group](const Worker& w) { run_norm(w, rt, args, group.exchange(w, rt.kernels, rows * n)); });
}

// The sum of what all ranks have put into their slots.
void settle(Runtime& rt, AllReduce& group, uintptr_t out, int64_t n) {
  rt.execute([=, &rt, &group](const Worker& w) {
    rt.kernels.sum_parts(group.exchange(w, rt.kernels, n), w.begin(n), w.end(n), at<float>(out), false);
  });
}

void all_reduce(Runtime& rt, AllReduce& group, uintptr_t y, int64_t n) {
  rt.execute([=, &rt, &group](const Worker& w) { group.sum(w, rt.kernels, at<float>(y), n); });
}

void rope(Runtime& rt, uintptr_t x, int64_t stride, uintptr_t cos, uintptr_t sin, int64_t rows, int64_t heads,
          int64_t head_dim, int64_t half) {
  rt.execute([=, &rt](const Worker& w) {
    rt.kernels.rope(w, at<bf16>(x), stride, at<const float>(cos), at<const float>(sin), rows, heads, head_dim, half);
  });
}

void kv_append(Runtime& rt, uintptr_t k, uintptr_t v, int64_t stride, const CacheArgs& cache, const BatchArgs& batch) {
  rt.execute([=, &rt](const Worker& w) {
    rt.kernels.kv_append(w, at<const bf16>(k), at<const bf16>(v), stride, cache, batch);
  });
}

void attention(Runtime& rt, uintptr_t q, int64_t q_stride, uintptr_t out, int64_t q_heads, int64_t group,
               int64_t group_offset, int64_t window, float scale, float softcap, uintptr_t slopes,
               const CacheArgs& cache, const BatchArgs& batch) {
  if (cache.head_dim > kMaxHeadDim) throw std::invalid_argument("attention: head_dim above 576");
  rt.reserve_scratch(rt.team.size() * sizeof(AttentionScratch));
  const AttentionArgs args{
      at<const bf16>(q),       q_stride, at<bf16>(out), q_heads, group, group_offset, window, scale, softcap,
      at<const float>(slopes), nullptr};
  rt.execute([=, &rt](const Worker& w) {
    AttentionArgs with_scratch = args;
    with_scratch.scratch = reinterpret_cast<AttentionScratch*>(rt.scratch());
    rt.kernels.attention(w, with_scratch, cache, batch);
  });
}

void head_norm(Runtime& rt, uintptr_t x, int64_t stride, uintptr_t weight, int64_t rows, int64_t heads,
               int64_t head_dim, float eps) {
  rt.execute([=, &rt](const Worker& w) {
    rt.kernels.head_norm(w, at<bf16>(x), stride, at<const float>(weight), rows, heads, head_dim, eps);
  });
}

void add_rows(Runtime& rt, uintptr_t x, uintptr_t y, bool fp32, int64_t n) {
  rt.execute([=, &rt](const Worker& w) { rt.kernels.add_rows(w, at<float>(x), at<const void>(y), fp32, n); });
}

void softcap(Runtime& rt, uintptr_t x, int64_t n, float cap) {
  rt.execute([=, &rt](const Worker& w) { rt.kernels.softcap(w, at<float>(x), n, cap); });
}

void embedding(Runtime& rt, uintptr_t ids, uintptr_t table, float scale, uintptr_t out, int64_t rows, int64_t n) {
  rt.execute([=, &rt](const Worker& w) {
    rt.kernels.embedding(w, at<const int32_t>(ids), at<const bf16>(table), scale, at<float>(out), rows, n);
  });
}

// Of each thread of the team, by the kernel: by the time that it answers it has been pinned.
std::vector<int> thread_ids(Runtime& rt) {
  std::vector<int> ids(rt.team.size());
  rt.team.run([&](const Worker& w) { ids[w.index] = gettid(); });
  return ids;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "distinf's native kernels, on raw addresses";
  py::enum_<Isa>(m, "Isa")
      .value("avx2", Isa::kAvx2)
      .value("avx512", Isa::kAvx512)
      .value("avx512_bf16", Isa::kAvx512Bf16)
      .value("amx", Isa::kAmx);
  py::enum_<Act>(m, "Act")
      .value("none", Act::kNone)
      .value("silu", Act::kSilu)
      .value("gelu", Act::kGelu)
      .value("gelu_tanh", Act::kGeluTanh)
      .value("relu", Act::kRelu);
  m.def("isa_available", &isa_available);
  m.def("cpu_name", &cpu_name);

  py::enum_<ScaleType>(m, "ScaleType")
      .value("bf16", ScaleType::kBf16)
      .value("fp16", ScaleType::kFp16)
      .value("fp32", ScaleType::kFp32);
  py::class_<Weight>(m, "Weight")
      .def_readonly("n", &Weight::n)
      .def_readonly("k", &Weight::k)
      .def_property_readonly("nbytes", &Weight::bytes)
      .def_property_readonly("address", [](const Weight& w) { return reinterpret_cast<uintptr_t>(w.data); })
      .def("pack_rows", &pack_rows, py::call_guard<py::gil_scoped_release>())
      .def("pack_integers", &pack_integer_rows, py::call_guard<py::gil_scoped_release>());
  m.attr("BLOCK_SIZE") = kBlockSize;
  py::class_<CacheArgs>(m, "Cache")
      .def(py::init(
          [](uintptr_t k, uintptr_t v, uintptr_t k_scale, uintptr_t v_scale, int64_t kv_heads, int64_t head_dim) {
            return CacheArgs{at<void>(k), at<void>(v), at<float>(k_scale), at<float>(v_scale), kv_heads, head_dim};
          }));
  py::class_<BatchArgs>(m, "Batch")
      .def(py::init(
          [](uintptr_t positions, uintptr_t sequence, uintptr_t block_table, int64_t max_blocks, int64_t rows) {
            return BatchArgs{at<const int32_t>(positions), at<const int32_t>(sequence), at<const int32_t>(block_table),
                             max_blocks, rows};
          }));

  bind_all_reduce(m);
  py::class_<StepProgram>(m, "StepProgram").def(py::init<>());

  py::class_<Runtime> runtime(m, "Runtime");
  bind_moe(runtime);
  runtime
      .def(py::init<Isa, const std::vector<int>&, bool>(), py::arg("isa"), py::arg("cpus"), py::arg("oversubscribed"))
      .def("thread_ids", &thread_ids)
      .def(
          "record", [](Runtime& rt, StepProgram* program) { rt.recording = program; }, py::arg("program").none(true))
      .def(
          "replay", [](Runtime& rt, const StepProgram& program) { program.replay(rt.team); }, NoLock())
      .def("new_weight", &new_weight)
      .def("linear", &linear, NoLock())
      .def("head_linear", &head_linear, NoLock())
      .def("partial_linear", &partial_linear, NoLock())
      .def("partial_zeros", &partial_zeros, NoLock())
      .def("norm", &norm)
      .def("all_reduce_norm", &all_reduce_norm, NoLock())
      .def("settle", &settle, NoLock())
      .def("all_reduce", &all_reduce, NoLock())
      .def("rope", &rope)
      .def("kv_append", &kv_append)
      .def("attention", &attention, NoLock())
      .def("head_norm", &head_norm)
      .def("add_rows", &add_rows)
      .def("softcap", &softcap)
      .def("embedding", &embedding)
      .def("peak_tops", &peak_tops, py::arg("int8"), py::arg("repeats"));

  py::class_<ReadProbe>(m, "ReadProbe")
      .def(py::init<Runtime&>(), py::keep_alive<1, 2>())
      .def_property_readonly("bytes", &ReadProbe::bytes)
      .def("read_s", &ReadProbe::read_s, py::arg("prefetch"));
}
